"What a script needs: `from onecycle_prune.all import *`, beside fastai's own `all`"
from .schedule import *
from .criteria import *
from .granularity import conv, linear, granularities
from .sparsifier import Sparsifier
from .callback import *
from .report import *
