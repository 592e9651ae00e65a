"""Training.

trainer.py         the loop
model.py           towers and objective as one module
gradients.py       the gradient of a step, at once or in chunks
optim.py           optimizers and learning rates
weight_average.py  the moving average of the towers' weights
nan_check.py       losses and gradients that are not finite
checkpoint.py      what a run saves, and how it continues
atomic_folder.py   folders that all ranks write together
run_folder.py      checkpoints of a run, and its lock
run_info.py        run.json
reference.py       the reference model of drrho
run_log.py         progress, metrics.jsonl, eval.jsonl
trackers.py        TensorBoard, Weights & Biases, trackio
signals.py         signals that stop a run
"""
