"""The command line; heavy imports only inside a command.

main.py       demo · train · objectives · compare · report · temperature
data.py       data index · shard · verify · preview · download;  task.py: data task
evaluate.py   evaluate;  export.py: export
migrate.py    migrate · import
launch.py     launch;  slurm.py: the batch script from one template, slurm.sbatch
"""
