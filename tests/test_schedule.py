"Schedules give the numbers that the published formulas give by hand."
import math, pickle

import matplotlib.pyplot as plt
import pytest
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastai.test_utils import synth_learner

from onecycle_prune.schedule import *

close = lambda x: pytest.approx(x, abs=1e-9)

# s(t) = (1+e^-8) / (1+e^(6-14t)). With e^-8 = .000335462628, the numerator is 1.000335462628 and the denominator
#   t = 0:    1+e^6  = 404.428793493    t = 5/14: 1+e  = 3.718281828459    t = 6/14: 1+1 = 2
#   t = 7/14: 1+1/e  = 1.367879441171   t = 1:    1+e^-8, the numerator itself
onecycle_points = [(0, .002473452639), (5/14, .269031641162), (6/14, .500167731314), (.5, .731303821454), (1, 1)]


@pytest.mark.parametrize('pos,s', onecycle_points)
def test_onecycle(pos, s):
    assert sched_onecycle(0, 1, pos) == close(s)
    assert SchedOneCycle(0, 1)(pos) == close(s)
    # .2 + (.9-.2)*s: the start need not be 0, and the end need not be 1
    assert SchedOneCycle(.2, .9)(pos) == close(.2 + .7*s)


def test_onecycle_alpha_beta():
    # α=10, β=5 at its middle: (1+e^-5)/2 = 1.006737946999/2
    assert SchedOneCycle(0, 1, α=10, β=5)(.5) == close(.5033689735)
    assert sched_onecycle(0, 1, .5, 10, 5) == close(.5033689735)


def test_oneshot(): assert [SchedOneShot(.2, .9)(p) for p in (0, .3, 1)] == [.9]*3


@pytest.mark.parametrize('n_steps,pos,s', [
    (3, 0, 0), (3, .001, 1/3), (3, 1/3, 1/3), (3, .334, 2/3), (3, 2/3, 2/3), (3, .667, 1), (3, 1, 1),
    (4, .25, .25), (4, .2501, .5), (1, 0, 0), (1, .001, 1),
    (10, .1+.2, .3)])  # rounding puts it slightly above .3, the edge of the third step
def test_iterative(n_steps, pos, s):
    assert SchedIterative(0, 1, n_steps)(pos) == close(s)
    assert sched_iterative(.2, .9, pos, n_steps) == close(.2 + .7*s)


def test_iterative_steps(): assert SchedIterative(0, 1)(.5) == close(2/3)  # three steps by default


# 1-(1-t)^3: .75^3 = .421875, .5^3 = .125, .25^3 = .015625
@pytest.mark.parametrize('pos,s', [(0, 0), (.25, .578125), (.5, .875), (.75, .984375), (1, 1)])
def test_agp(pos, s):
    assert SchedAGP(0, 1)(pos) == close(s)
    assert SchedAGP(.2, .9)(pos) == close(.2 + .7*s)


# (1-cos 2πt)/2: the cosine of 60° is 1/2, of 90° 0, of 120° -1/2
@pytest.mark.parametrize('pos,s', [(0, 0), (1/6, .25), (.25, .5), (1/3, .75), (.5, 1), (.75, .5), (5/6, .25), (1, 0)])
def test_dsd(pos, s):
    assert SchedDSD(0, 1)(pos) == close(s)
    assert SchedDSD(.2, .9)(pos) == close(.2 + .7*s)


named = dict(
    one_cycle=onecycle_points,
    one_shot=[(0, 0), (.499, 0), (.5, 1), (1, 1)],
    # from 20 %, so that the three steps are .8/3 wide: they end at .4667, .7333 and 1
    iterative=[(0, 0), (.199, 0), (.2, 0), (.201, 1/3), (.466, 1/3), (.467, 2/3), (.733, 2/3), (.734, 1), (1, 1)],
    # from 20 %: .4 is a quarter of the way, .6 half of it
    agp=[(0, 0), (.199, 0), (.2, 0), (.4, .578125), (.6, .875), (1, 1)],
    cos=[(0, 0), (.25, .146446609407), (1/3, .25), (.5, .5), (1, 1)],  # (1-cos 45°)/2 = (1-.707106781187)/2
    lin=[(0, 0), (.25, .25), (1, 1)],
    dsd=[(0, 0), (1/6, .25), (.5, 1), (1, 0)],
    at_start=[(0, 1), (.5, 1), (1, 1)])


@pytest.mark.parametrize('name,pos,s', [(n, *o) for n, points in named.items() for o in points])
def test_named(name, pos, s): assert get_schedule(name)(pos) == close(s)


def test_all_named(): assert set(schedules) == {*named, *schedule_aliases}


@pytest.mark.parametrize('alias,schedule', [('linear', lin), ('cosine', cos), ('cubic', agp)])
def test_aliases(alias, schedule):
    "A second name gives the very same schedule"
    assert schedules[alias] is schedule and get_schedule(alias) is schedule and alias in schedule_aliases


@pytest.mark.parametrize('name', named)
def test_monotone(name):
    "A schedule never falls, except dense-sparse-dense, which rises to its middle and then never rises again"
    ys = [schedules[name](i/1000) for i in range(1001)]
    peak = 500 if name == 'dsd' else 1000
    assert ys == sorted(ys[:peak]) + sorted(ys[peak:], reverse=True)


@pytest.mark.parametrize('name', [o for o in named if o != 'dsd'])
def test_ends_exactly(name): assert schedules[name](1) == 1  # exactly, so that not one weight is missing


def test_window():
    s = Schedule(SchedCos(0, 1), start_pct=.2, end_pct=.8)
    # a third of the window is (1-cos 60°)/2
    assert [s(p) for p in (0, .19, .2, .4, .5, .6, .8, .9, 1)] == close([0, 0, 0, .25, .5, .75, 1, 1, 1])


def test_window_before():
    "Before the start the progress is 0, also if the annealing itself starts above 0"
    s = Schedule(SchedOneCycle(.5, 1), start_pct=.3)
    assert s(.29) == 0 and s(.3) > .5


def test_plain_function():
    s = get_schedule(lambda pos: pos**2)
    assert [s(p) for p in (0, .3, 1)] == close([0, .09, 1])


def test_float_error():
    "A curve that leaves [0, 1] by a rounding error is corrected"
    assert get_schedule(lambda pos: pos*(1 + 1e-9))(1) == 1
    assert get_schedule(lambda pos: pos - 1e-9)(0) == 0


def test_schedule_itself():
    s = Schedule(SchedLin(0, 1), start_pct=.5)
    assert get_schedule(s) is s and get_schedule('agp') is agp


def test_combine():
    "combine_scheds of fastai works: up in the first half, down in the second"
    s = combine_scheds([.5, .5], [SchedOneCycle(0, 1), SchedOneCycle(1, 0)])
    assert [s(p) for p in (.25, .75, 1)] == pytest.approx([.731303821454, 1-.731303821454, 0], abs=1e-6)


def test_param_scheduler():
    "ParamScheduler of fastai can schedule a learning rate with it"
    learn = synth_learner(n_trn=14)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ParamScheduler({'lr': SchedOneCycle(0, .1)}))
    lrs = learn.recorder.hps['lr']
    assert len(lrs) == 14
    assert [lrs[i] for i in (0, 5, 6, 7)] == pytest.approx([.1*s for _, s in onecycle_points[:4]], abs=1e-6)


partials = dict(onecycle=SchedOneCycle(.2, .9, α=10, β=5), oneshot=SchedOneShot(.2, .9), agp=SchedAGP(.2, .9),
                iterative=SchedIterative(.2, .9, n_steps=5), dsd=SchedDSD(.2, .9))


@pytest.mark.parametrize('f', [*partials.values(), *schedules.values()], ids=[*partials, *schedules])
def test_pickle(f):
    again = pickle.loads(pickle.dumps(f))
    assert [again(i/10) for i in range(11)] == [f(i/10) for i in range(11)]


@pytest.mark.parametrize('f', [
    SchedCos(0, 90), SchedLin(0, -.1), lambda pos: math.nan, lambda pos: math.inf,
    lambda pos: 2. if .4 < pos < .41 else pos],  # not only at its ends
    ids=['percent', 'negative', 'nan', 'inf', 'bump'])
def test_leaves(f):
    "A curve outside [0, 1] raises an error when the schedule is built"
    with pytest.raises(ValueError, match=r'progress in \[0, 1\].* gives '): get_schedule(f)


def test_not_a_curve():
    "A function that cannot be called with a position raises an error that says so"
    with pytest.raises(ValueError, match=r'Calling .*SchedCos.* with a position failed'): get_schedule(SchedCos)


@pytest.mark.parametrize('name,right', [
    ('one_cycel', 'one_cycle'), ('One_Shot', 'one_shot'), ('itrative', 'iterative')])
def test_nearest(name, right):
    with pytest.raises(ValueError, match=f"{name}.*Did you mean '{right}'.*agp"): get_schedule(name)


@pytest.mark.parametrize('word,right', [
    ('gradual', "'agp'"), ('automated_gradual_pruning', "'agp'"), ('cosine_annealing', "'cosine'"),
    ('SchedCos', "'cosine'"), ('sched_lin', "'linear'"), ('dense_sparse_dense', "'dsd'"),
    ('constant', "'at_start'"), ('none', "'at_start'")])
def test_hints(word, right):
    "A word of another library is answered with the same schedule"
    with pytest.raises(ValueError, match=f"Did you mean {right}.*Allowed: one_cycle, .*linear"): get_schedule(word)


@pytest.mark.parametrize('word', ['polynomial', 'exponential', 'step', 'sigmoid', 'cyclic', 'warmup'])
def test_no_hint(word):
    "A word that no schedule here means has no hint"
    with pytest.raises(ValueError, match='^((?!Did you mean).)*$'): get_schedule(word)


def test_class():
    "A class is not a schedule, and its instance is"
    with pytest.raises(ValueError, match='Did you mean an instance, such as Schedule.*Allowed: one_cycle'):
        get_schedule(Schedule)


@pytest.mark.parametrize('schedule,shown', [
    (one_cycle, 'Schedule(sched_onecycle(α=14.0, β=6.0))'), (agp, 'Schedule(sched_agp, start_pct=0.2)'),
    (Schedule(SchedIterative(0, 1, 5), .1, .9), 'Schedule(sched_iterative(n_steps=5), start_pct=0.1, end_pct=0.9)'),
    (lin, 'Schedule(sched_lin)')])
def test_repr(schedule, shown): assert repr(schedule) == shown


@pytest.mark.parametrize('schedule', ['', 'qqq', None, .9, ['agp']])
def test_unknown(schedule):
    with pytest.raises(ValueError, match='Unknown schedule: .*one_cycle.*function'): get_schedule(schedule)


@pytest.mark.parametrize('start,end', [(.5, .5), (.8, .2), (-.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan)])
def test_wrong_window(start, end):
    with pytest.raises(ValueError, match='start_pct < end_pct'): Schedule(SchedLin(0, 1), start, end)


@pytest.fixture
def axes():
    yield plt.figure().subplots()
    plt.close('all')


def curves(ax): return [list(l.get_ydata()) for l in ax.lines]


def test_plot(axes):
    "Any number of curves in the given axes; five positions are the quarters"
    ax = plot_schedules('lin', SchedAGP(0, 1), lambda pos: pos**2, n=5, ax=axes)
    assert ax is axes
    assert curves(ax) == [close(ys) for ys in
        ([0, .25, .5, .75, 1], [0, .578125, .875, .984375, 1], [0, .0625, .25, .5625, 1])]
    assert list(ax.lines[0].get_xdata()) == [0, .25, .5, .75, 1]


def test_plot_sparsity(axes): assert curves(plot_schedules('lin', sparsity=.8, n=3, ax=axes)) == [close([0, .4, .8])]


def test_plot_all(axes):
    "Without names, each schedule is drawn once, under its first name"
    ax = plot_schedules()
    assert ax is not axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(named)


def test_plot_labels(axes):
    "The label is the name of the schedule or else of its curve, also within a window"
    given = [agp, SchedAGP(0, 1), Schedule(SchedAGP(0, 1), .1), SchedCos(0, 1), Schedule(SchedCos(0, 1), .1)]
    ax = plot_schedules(*given, 'cubic', ax=axes)
    assert [l.get_label() for l in ax.lines] == ['agp', 'sched_agp', 'sched_agp', 'sched_cos', 'sched_cos', 'cubic']


def test_plot_labels_differ(axes):
    "Settings are in the label; a composed curve of fastai is in the legend, though its name starts with an underscore"
    composed = combine_scheds([.5, .5], [SchedCos(0, .5), SchedCos(.5, 1)])
    ax = plot_schedules('one_cycle', SchedOneCycle(0, 1, α=20, β=8), composed, ax=axes)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels[:2] == ['one_cycle', 'sched_onecycle(α=20, β=8)'] and len(labels) == 3
