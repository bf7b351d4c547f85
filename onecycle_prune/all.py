"The names that a script needs: `from onecycle_prune.all import *`, next to fastai's own `all`"
from .at_init import grasp, input_norms, snip, synflow
from .batchnorm import estimate_batchnorms
from .callback import SparsifyCallback
from .criteria import (AtInit, Criteria, Drawn, Shuffled, Variety, criteria, get_criteria, large_final, large_init,
    large_init_large_final, magnitude_change, magnitude_increase, movement, movmag, needs_gradient, small_final,
    small_init, small_init_small_final, squared_final, taylor, updating_magnitude_increase, updating_movement,
    updating_movmag)
from .deploy.columns import drop_columns, unread_columns, unread_inputs
from .deploy.compress import compress
from .deploy.costs import costs, milliseconds, plot_costs
from .deploy.shrink import plot_widths, shrink, shrink_like, shrink_report
from .deploy.speed_up import speed_up
from .distributions import ByCost
from .finder import FoundSparsity
from .granularity import Structured, granularities
from .methods.activations import ScaledActivation, replace_activations
from .methods.distill import DistillCallback, SimulatedPruning
from .methods.tickets import find_tickets
from .regrow import Exchange, regrowths
from .report import plot_layers, sparsity_report
from .schedule import (SchedAGP, SchedDSD, SchedIterative, SchedOneCycle, SchedOneShot, Schedule, agp, at_start,
    dsd, get_schedule, iterative, one_cycle, one_shot, plot_schedules, sched_agp, sched_dsd, sched_iterative,
    sched_onecycle, sched_oneshot, schedules)
from .sparsifier import Sparsifier

# `cos`, `lin`, `conv`, `linear` and `random` stay in their modules, because scripts use these names for other things.
__all__ = ['AtInit', 'ByCost', 'Criteria', 'DistillCallback', 'Drawn', 'Exchange', 'FoundSparsity',
    'ScaledActivation', 'SchedAGP', 'SchedDSD', 'SchedIterative', 'SchedOneCycle', 'SchedOneShot',
    'Schedule', 'Shuffled', 'SimulatedPruning', 'Sparsifier', 'SparsifyCallback', 'Structured', 'Variety',
    'agp', 'at_start', 'compress', 'costs', 'criteria', 'drop_columns', 'dsd', 'estimate_batchnorms',
    'find_tickets', 'get_criteria', 'get_schedule', 'granularities', 'grasp', 'input_norms', 'iterative',
    'large_final', 'large_init', 'large_init_large_final', 'magnitude_change', 'magnitude_increase',
    'milliseconds', 'movement', 'movmag', 'needs_gradient', 'one_cycle', 'one_shot', 'plot_costs',
    'plot_layers', 'plot_schedules', 'plot_widths', 'regrowths', 'replace_activations', 'sched_agp',
    'sched_dsd', 'sched_iterative', 'sched_onecycle', 'sched_oneshot', 'schedules', 'shrink', 'shrink_like',
    'shrink_report', 'small_final', 'small_init', 'small_init_small_final', 'snip', 'sparsity_report',
    'speed_up', 'squared_final', 'synflow', 'taylor', 'unread_columns', 'unread_inputs',
    'updating_magnitude_increase', 'updating_movement', 'updating_movmag']
