"""Quantised checkpoints from the original release: streamed, resumable, verified, with the MTP layers kept.

`convert` takes mlx-lm's arguments and ours; the command line is the same call. The work is in `conversion/`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mlx_step35.conversion.options import DType, Options, output_directory, parse_size
from mlx_step35.conversion.plan import MTPChoice
from mlx_step35.conversion.run import run
from mlx_step35.exits import run_command
from mlx_step35.quantization import Mode
from mlx_step35.recipes import RECIPES, RecipeName


def convert(
    hf_path: str,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: Mode = "affine",
    dtype: DType | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    *,
    recipe: RecipeName | None = None,
    target_size: str | int | None = None,
    q_overrides: Sequence[str] = (),
    mtp: MTPChoice = "keep",
    mtp_bits: int | None = None,
    verify: bool = False,
    dry_run: bool = False,
) -> None:
    """Convert a local directory or a hub repo; the positional arguments are mlx-lm's.

    Continues what an earlier call with the same arguments left unfinished. Raises a Step35Error, or OSError
    for a full disk; what was finished by then stays in place.
    """
    run(
        Options(
            hf_path=str(hf_path),
            mlx_path=output_directory(mlx_path),
            quantize=quantize,
            q_group_size=q_group_size,
            q_bits=q_bits,
            q_mode=q_mode,
            dtype=dtype,
            upload_repo=upload_repo,
            revision=revision,
            dequantize=dequantize,
            recipe=recipe,
            target_size=parse_size(target_size) if isinstance(target_size, str) else target_size,
            q_overrides=tuple(q_overrides),
            mtp=mtp,
            mtp_bits=mtp_bits,
            verify=verify,
            dry_run=dry_run,
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ends the process unless all is well."""
    given = sys.argv[1:] if arguments is None else arguments
    if code := run_command(lambda: run(_parse(given)), "interrupted; the same command continues"):
        sys.exit(code)


def _parse(arguments: Sequence[str]) -> Options:
    given = _parser().parse_args(arguments)
    return Options(
        hf_path=given.hf_path,
        mlx_path=output_directory(given.mlx_path),
        quantize=given.quantize,
        q_group_size=given.q_group_size,
        q_bits=given.q_bits,
        q_mode=given.q_mode,
        dtype=given.dtype,
        upload_repo=given.upload_repo,
        revision=given.revision,
        dequantize=given.dequantize,
        recipe=given.recipe,
        target_size=None if given.target_size is None else parse_size(given.target_size),
        q_overrides=tuple(given.q_overrides),
        mtp=given.mtp,
        mtp_bits=given.mtp_bits,
        verify=given.verify,
        dry_run=given.dry_run,
        command=shlex.join(["mlx_step35.convert", *arguments]),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_step35.convert",
        description="Convert the original release, one slice at a time. The same command resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help="source: a local directory or a hub repo id")
    add("--mlx-path", default="mlx_model", help="output directory")
    add("--revision", help="branch, tag or commit of a hub source")
    add("-q", "--quantize", action="store_true", help="quantise uniformly, as mlx-lm does")
    add("--q-bits", type=int, help="bits per weight (2, 3, 4, 5, 6 or 8)")
    add("--q-group-size", type=int, help="weights per scale (32, 64 or 128)")
    add("--q-mode", choices=get_args(Mode), default="affine", help="quantisation mode")
    add("--recipe", choices=RECIPES, help="what fits the default GPU limit of a Mac, with a 64K context")
    add("--target-size", metavar="SIZE", help="the best recipe of that size, such as 92GB")
    add(
        "--q-overrides",
        action="append",
        default=[],
        metavar="REGEX=BITS[:GROUP]",
        help="bits for module paths that match; 16 leaves them unquantised; may be repeated",
    )
    add("--dtype", choices=get_args(DType), help="of everything unquantised; the source's by default")
    add("-d", "--dequantize", action="store_true", help="unpack a quantised source")
    add("--mtp", choices=get_args(MTPChoice), default="keep", help="the multi-token-prediction layers")
    add("--mtp-bits", type=int, help="their bits: 4, or 16 for unquantised")
    add("--verify", action="store_true", help="compare every tensor with the source afterwards")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--upload-repo", metavar="REPO", help="publish the result under this hub repo id")
    return parser


if __name__ == "__main__":
    main()
