"""Modules:

- `onecycle_prune.batchnorm`: Batch-norm statistics that belong to the weights that are left
- `onecycle_prune.callback`: Pruning in the batches of a fastai training
- `onecycle_prune.channels`: Which channels of a network belong together, and which of them nobody needs
- `onecycle_prune.checkpoint`: What a checkpoint does not hold
- `onecycle_prune.checks`: Checks of the scores, without waiting for the device
- `onecycle_prune.criteria`: A score for each weight: how important it is
- `onecycle_prune.deploy.compress`: Files as small as the weights that are left
- `onecycle_prune.deploy.costs`: What a network costs: parameters, bytes, multiplications and milliseconds
- `onecycle_prune.deploy.kernels`: The loops of a plan that numba compiles: they multiply by the weights that are not zero, and by no others
- `onecycle_prune.deploy.plan`: A part of a network as one sequence of steps, which runs without returning to PyTorch in between
- `onecycle_prune.deploy.regions`: Which parts of a network run as plans, and how they are found in it
- `onecycle_prune.deploy.shrink`: A smaller network: channels that are always zero are really removed
- `onecycle_prune.deploy.speed_up`: A network that skips its zeros, for inference on a CPU
- `onecycle_prune.deploy.workers`: Several threads at once, for kernels that release Python's lock
- `onecycle_prune.experiments.analysis`: The results of a grid of trainings: tables, differences with confidence intervals, and plots
- `onecycle_prune.experiments.bench`: The cost of pruning: the time it adds to a training step, for this package and for fasterai
- `onecycle_prune.experiments.bench_inference`: How fast a pruned network is on a CPU: PyTorch, ONNX Runtime, OpenVINO and `speed_up`
- `onecycle_prune.experiments.demo`: The main task on one page: dense, one-cycle and the paper's baselines with the same budget
- `onecycle_prune.experiments.deployed`: What a trained network gains when it is used: dense, pruned, compressed, sped up
- `onecycle_prune.experiments.grid`: The paper's experiment: a grid of trainings that can be interrupted and continued
- `onecycle_prune.granularity`: Which weights are pruned together: single weights, or groups of them
- `onecycle_prune.guard`: Keep the model pruned, whatever happens in a fit
- `onecycle_prune.layers`: Which layers are pruned, and what their tensors are called
- `onecycle_prune.notices`: Warnings at the start of a fit
- `onecycle_prune.observe`: What happens in one forward pass: which norms follow a filter, and which weights are used
- `onecycle_prune.pools`: The layers that compete, and how many of their groups shall be pruned
- `onecycle_prune.report`: Tables and plots of a pruned model and of its training
- `onecycle_prune.schedule`: The share of the target sparsity that is reached at each position of the training
- `onecycle_prune.select.bits`: The bits of a weight as an integer, zeros written in place, and memory layouts
- `onecycle_prune.select.core`: The one public function of selection: the exact k lowest of each pool
- `onecycle_prune.select.numba_backend`: Fused pruning on a CPU: scores, selection and zeroing in one pass over the weights
- `onecycle_prune.select.numba_kernels`: The loops over the weights that numba compiles, for one thread or several
- `onecycle_prune.select.numpy_backend`: The same choice on a CPU, without a sort of the whole pool
- `onecycle_prune.select.reference`: What selection means, and its plainest answer: one stable sort
- `onecycle_prune.select.triton_backend`: Fused magnitude pruning on a GPU, in Triton
- `onecycle_prune.sparsifier`: Score, select and prune, on one model"""

__version__ = "0.1.0"
