"""Generate a set of images from a checkpoint, for FID and for the eye.

torchrun --nproc_per_node=8 sample_ddp.py --ckpt runs/NAME --image-size 256 \
    --per-proc-batch-size 125 --num-fid-samples 50000 --cfg-scale 1.0 --num-sampling-steps 250 \
    --sample-dir samples

Writes to samples/RUN/SET/: samples.npz (arr_0, NHWC uint8, as ADM's evaluator reads it), a grid,
and set.json with every setting; `--metrics REF.npz --save none` scores the images while they are
made instead. They do not depend on the number of processes. A set that was interrupted goes on when
it is started again, one that is finished stays, and one of other settings is refused.
On the CPU each process computes on one thread, so start as many as there are cores.
"""

from core.distributed import NO_HURRY, processes
from core.errors import command
from evaluations.sampled import parse_flags, sample_and_score


@command
def main() -> None:
    """Parse the command line and sample."""
    flags = parse_flags()
    with processes(flags.device, cpu_threads=1, timeout=NO_HURRY) as all_processes:
        sample_and_score(flags, all_processes)


if __name__ == "__main__":
    main()
