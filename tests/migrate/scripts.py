"""Scripts that users bring, in the forms of the three codes; the first is the founding README's training command."""

FOUNDING = r"""#!/bin/bash

##NECESSARY JOB SPECIFICATIONS
#SBATCH --job-name=TempNetTraining            # Set the job name to "TempNetTraining"
#SBATCH --time=40:00:00                        # Set the wall clock limit to 30 hours
#SBATCH --ntasks=8                           # Request 8 tasks (for distributed training)
#SBATCH --ntasks-per-node=2                    # Request 8 tasks per node
#SBATCH --cpus-per-task=6
#SBATCH --mem=80G                              # Request 80GB of memory
#SBATCH --gres=gpu:a100:2                    # Request 8 A100 GPUs (2 per node)
#SBATCH --partition=gpu                         # Specify the partition for GPU jobs

export TRANSFORMERS_OFFLINE=1
data_path=/path/to/your/data/cc12m # Base data path
imagenet_val_path=/path/to/your/data/imagenet/val
train_image_root=/path/to/your/data/cc12m
data=cc12m
val_coco_file=/path/to/your/data/coco_val.json
lr=0.0008
frac=1.0
desc=isogclr_tempnet
gamma=0.8
rho=9.5

cd /working/directory
master_addr=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$master_addr

srun python -u  clip_cc12m.py \
    --train-data '/path/to/your/data/cc12m/{00000..01242}.tar' \
    --train-num-samples 9184307 --data_size 12423374 \
    --dataset_type webdataset\
    --data_path ${data_path} \
    --data ${data} \
    --train_file ${train_file} \
    --train_image_root ${train_image_root} \
    --val_coco_file ${val_coco_file} \
    --output_dir output/TempNet_ViT_${data}_gamma${gamma}_rho${rho}_${desc} \
    --use_amp \
    --init_model \
    --image_encoder ViT \
    --text_encoder Transformer \
    --epochs 33 --lr ${lr} \
    --lr_temp_net 3e-5 \
    --rho ${rho} \
    --train_frac ${frac} \
    --zs_dataset imagenet \
    --zs_datafolder ${imagenet_val_path} \
    --ita_type isogclr_tempnet \
    --batch_size_train 512 \
    --world_size 8 \
    --distributed True \
    --warmup_epochs 20 \
    --workers 2 \
    --seed 2024 \
    --image_res 224 \
    --sogclr_gamma ${gamma} \
    --embed_dim 512
"""

CC3M = r"""#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=2 -t 30:00:00
data=cc3m
lr=0.0008
srun python -u  clip_cc3m.py \
    --data ${data} --train_file /scratch/clip_train/cc3m_train.json --train_image_root /scratch/cc3m \
    --output_dir output/isogclr_tempnet_${data} \
    --use_amp --init_model --epochs 30 --lr ${lr} --lr_temp_net 3e-5 --rho 9.5 --train_frac 1.0 \
    --zs_dataset imagenet --zs_datafolder /imagenet/val --ita_type isogclr_tempnet \
    --batch_size_train 512 --world_size 8 --distributed True --warmup_epochs 20 --sogclr_gamma 0.8
"""

_FASTCLIP = r"""#!/bin/bash
#SBATCH --time=2-00:00:00
#SBATCH --nodes=2
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --wait-all-nodes=1
#SBATCH --partition=gpu
export PYTHONPATH="$PYTHONPATH:$PWD/src"
srun python -u src/training/main.py \
    --save-frequency 1 \
    --train-data './datasets/cc3m_webdataset/cc3m_train/{00000..00331}.tar' \
    --train-num-samples 2723840 --data_size 3318333 \
    --warmup 10000 \
    --batch-size 256 \
    --epochs 37 \
    --workers 6 \
    --model RN50 \
    --name medium_fastclip \
    --seed 2024 \
    --profile \
    --wd 0.1 \
    --local-loss \
    --fastclip OBJECTIVE \
    --lr 1e-3 \
    --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18
"""

FASTCLIP = {
    "v0": _FASTCLIP.replace("OBJECTIVE", "--temperature_scheme global_learnable"),
    "v1": _FASTCLIP.replace("OBJECTIVE", "--temperature_scheme global_constant"),
    "v2": _FASTCLIP.replace(
        "OBJECTIVE",
        "--temperature_scheme individual_learnable --lr_tau 0.0133 --lr_tau_scheduler const --temperature 0.03 --rho 7",
    ),
    "v3": _FASTCLIP.replace(
        "OBJECTIVE",
        "--multiply_tau --temperature_scheme global_learnable --lr_tau 2e-4 --lr_tau_scheduler step_thresh --rho 6.5",
    ),
}

OPEN_CLIP = r"""
cd open_clip/src
DATA=/data/cc12m
ARGS=(--precision amp_bf16 --name "cc12m base")
# 1280 pairs a step
TORCH_CUDNN_V8_API_ENABLED=1 torchrun --nproc_per_node 4 -m open_clip_train.main \
    --train-data "${DATA}/cc12m-train-{0000..2175}.tar" \
    --train-num-samples 10968539 \
    --dataset-type webdataset \
    --batch-size=320 --lr 5e-4 \
    "${ARGS[@]}" \
    --workers ${WORKERS:-6} \
    --model ViT-B-32 \
    --imagenet-val $DATA/imagenet/validation/ --zeroshot-frequency 3 \
    --accum-freq 2 --grad-clip-norm 1.0 --gather-with-grad --report-to wandb 2>&1 | tee log.txt
"""
