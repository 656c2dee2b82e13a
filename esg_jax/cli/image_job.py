"""What commands share that turn images into files: arguments, progress, bad files, exit status."""

import abc
import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from esg_jax.cli import FAILED, OK, USAGE


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, where the results go, and how the network runs."""
    add = parser.add_argument
    add("path", metavar="IMAGE_OR_FOLDER", type=Path, help="an image file, or a folder of them (not searched deeper)")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results; created when missing")
    add("--batch-size", type=positive, default=1, metavar="N",
        help="images per step, split over the local devices (default: 1)")  # fmt: skip
    add("--mesh", metavar="DATA,FSDP,MODEL",
        help="devices along each axis, such as 1,4,1: weights are split over FSDP and MODEL, images over DATA and FSDP "
        "(default: whole weights on up to --batch-size devices)")  # fmt: skip
    add("--precision", choices=("float32", "bfloat16"), default="float32",
        help="of the computation (default: float32; bfloat16 is faster on GPU and TPU)")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first bad file")


def positive(text: str) -> int:
    """Argument type: an integer from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def mesh_of(args: argparse.Namespace):
    """The devices that `--mesh` and `--batch-size` name.

    Raises:
        ValueError: sizes that are no three numbers, or that do not fit the devices.
    """
    import jax

    from esg_jax.sharding import make_mesh, parse_mesh

    if args.mesh is None:
        return make_mesh(-1, 1, 1, devices=jax.local_devices()[: args.batch_size])
    return parse_mesh(args.mesh)


class ImageJob(abc.ABC):
    """Images through a model to files. A bad image is reported at the end and the job goes on.

    Attributes:
        images: what is to be done.
        stems: their output names: the stem, or the whole name where two images share a stem.
        failures: images with what went wrong.
    """

    activity = "working"

    def __init__(self, args: argparse.Namespace):
        """Lists the images and creates the output folder."""
        from esg_jax.input.image_io import list_images

        self.args = args
        self.images = list_images(args.path)
        stems = [image.stem for image in self.images]
        self.stems = [image.name if stems.count(image.stem) > 1 else image.stem for image in self.images]
        self.failures: list[tuple[Path, Exception]] = []
        args.out.mkdir(parents=True, exist_ok=True)

    @abc.abstractmethod
    def work(self) -> Iterator[None]:
        """Does everything; yields once for every image that is done or has failed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what several images share; also after an interruption."""

    @abc.abstractmethod
    def summary(self, seconds: float) -> None:
        """Prints what was done."""

    def run(self) -> int:
        """Works through the images; returns the exit status."""
        from esg_jax.evaluation.workers import progress

        started, stopped = time.monotonic(), False
        try:
            with progress(self.activity, len(self.images)) as advance, contextlib.closing(self.work()) as done:
                for _ in done:
                    advance(1)
                    stopped = bool(self.failures) and self.args.strict
                    if stopped:
                        break
        finally:  # also after Ctrl-C: what is done is not lost
            self.close()
        self.summary(time.monotonic() - started)
        for path, error in self.failures:
            message = str(error)
            print(f"failed: {message if path.name in message else f'{path}: {message}'}", file=sys.stderr)
        if self.failures:
            note = ", stopped at the first (--strict)" if stopped else ""
            print(f"{len(self.failures)} of {len(self.images)} images failed{note}", file=sys.stderr)
        return FAILED if self.failures else OK


def run_job(name: str, start: Callable[[argparse.Namespace], ImageJob], args: argparse.Namespace) -> int:
    """Starts a job and runs it; what keeps it from starting is wrong use."""
    try:
        job = start(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"esg {name}: {error}", file=sys.stderr)
        return USAGE
    return job.run()
