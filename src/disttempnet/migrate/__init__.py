"""Coming from other training code: its scripts become configs, its checkpoints run folders.

script.py       a shell script → its commands with variables filled in, and its #SBATCH lines
flags.py        a command's words → values of flags; flags that nothing knows are kept and named
launcher.py     srun, torchrun, mpirun and #SBATCH → the number of processes, and options of `launch`
settings.py     config keys with the flag that each came from, as commented TOML
first_code.py   clip_cc12m.py and clip_cc3m.py of DistTempNet's first code
open_clip.py    open_clip's training main, and FastCLIP's, which has its flags and more
command.py      `disttempnet migrate`: a script → a config that the reader of configs accepts, and a report
checkpoint.py   `disttempnet import`: a checkpoint of the first code → a run folder
"""
