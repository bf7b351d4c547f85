"""Write results/first_example.csv: the accuracy of README's first example for five seeds, dense and pruned.

The example is run as it stands in nbs/index.ipynb. Only the callback that it adds is replaced."""
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from fastai.torch_core import set_seed
from fastcore.nbio import read_nb
from onecycle_prune._utils import atomic_write
from onecycle_prune.experiments.common import env_info

written = 'cbs=SparsifyCallback(.9)'
#: What replaces it, for each column
variants = {'dense': 'cbs=None', 'pruned': written,
            'pruned, running statistics': 'cbs=SparsifyCallback(.9, bn_batches=0)'}


def first_example() -> str:
    "The code of README up to the first training"
    cells = [c.source for c in read_nb('nbs/index.ipynb').cells if c.cell_type == 'code']
    shown = [source for source in cells if not source.startswith('#|')]
    end = next(i for i, source in enumerate(shown) if written in source)
    return '\n'.join(shown[:end+1])


def final_accuracy(code: str, seed: int) -> float:
    "Run `code`, and return the accuracy of its learner after the last epoch"
    set_seed(seed, reproducible=True)
    names = {}
    exec(code, names)
    return names['learn'].validate()[1]


def accuracies(code: str, seed: int) -> dict:
    "The row of the table for `seed`"
    return dict(seed=seed) | {name: final_accuracy(code.replace(written, o), seed) for name, o in variants.items()}


if __name__ == '__main__':
    code, target = first_example(), Path('results/first_example.csv').absolute()
    root = os.getcwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder) # where the example writes its images
        table = pd.DataFrame([accuracies(code, seed) for seed in range(5)]).assign(**env_info(torch.device('cpu')))
        os.chdir(root)
    atomic_write(target, lambda path: table.to_csv(path, index=False))
    print(table.to_string(index=False))
