"""Generate a set of images from a checkpoint, for FID and for the eye.

torchrun --nproc_per_node=8 sample_ddp.py --ckpt runs/NAME --image-size 256 \
    --per-proc-batch-size 125 --num-fid-samples 50000 --cfg-scale 1.0 --num-sampling-steps 250 \
    --sample-dir samples

Writes one .npz (arr_0, NHWC uint8, as ADM's evaluator reads it), a grid, and a JSON with every
setting. The images do not depend on the number of processes; on the CPU each of them computes
on one thread, so start as many as there are cores.
"""

from core.distributed import processes
from core.errors import command
from sampling.command import sample_from_checkpoint
from sampling.flags import parse_flags


@command
def main() -> None:
    """Parse the command line and sample."""
    flags = parse_flags()
    with processes(flags.device, cpu_threads=1) as all_processes:
        sample_from_checkpoint(flags, all_processes)


if __name__ == "__main__":
    main()
