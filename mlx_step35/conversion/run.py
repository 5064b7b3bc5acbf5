"""Carrying out a conversion: fetch, plan, write or resume, verify, publish."""

import platform
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_step35.checkpoint.headers import read_header, read_index, read_json
from mlx_step35.checkpoint.plan import module_path, mtp_settings
from mlx_step35.config import ModelConfig
from mlx_step35.conversion.card import CARD, Facts, model_card, source_license
from mlx_step35.conversion.hub import (
    SIDECARS,
    announced,
    check_upload,
    fetch_shards,
    fetch_small,
    upload,
)
from mlx_step35.conversion.journal import Journal, locked, open_journal
from mlx_step35.conversion.options import Options, choose_recipe
from mlx_step35.conversion.outputs import SHARD_METADATA, sidecar_metadata, small_files
from mlx_step35.conversion.plan import Plan, Shard, check_source, make_plan
from mlx_step35.conversion.report import describe
from mlx_step35.conversion.source import Source, mtp_names, read_source
from mlx_step35.conversion.stream import source_bytes, write_shard
from mlx_step35.conversion.tensorfile import TensorWriter, write_atomically
from mlx_step35.conversion.verify import verify, verify_small
from mlx_step35.costs import readable_bytes
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.layout import backbone_weights, mtp_weights
from mlx_step35.quantization import Quantization, QuantizationSettings


def run(options: Options) -> None:
    """Plan, print the plan, and unless it is a dry run carry it out."""
    options.check()
    if options.upload_repo is not None:
        check_upload(options.upload_repo)
    path = fetch_small(options.hf_path, options.revision)
    config = ModelConfig.from_hf(read_json(path / "config.json"))
    if options.dry_run and (known := announced(options.hf_path, path)):
        # Names are enough for a plan, so it can be made before anything large is downloaded.
        print(describe(_plan(options, config, known.names, known.metadata, known.mtp_metadata), config))
        return
    if options.mtp == "only" and not options.dry_run:
        _check_neighbour(options.mlx_path, config)
    index = read_index(path)
    # With no heads found, reading everything lets the plan say what is missing.
    wanted = (mtp_names(index, config) or None) if options.mtp == "only" else None
    path = fetch_shards(options.hf_path, path, _files(index, wanted))
    source = read_source(path, wanted)
    plan = _plan(options, config, source.entries.keys(), source.metadata, source.mtp_metadata)
    check_source(plan, source.entries)
    print(describe(plan, config))
    if options.dry_run:
        return
    if options.mtp == "only":
        _add_sidecar(options, source, plan)
    else:
        _write_checkpoint(options, source, plan)
    if options.upload_repo is not None:
        print(f"uploaded to {upload(options.mlx_path, options.upload_repo)}")


def _plan(
    options: Options,
    config: ModelConfig,
    names: Collection[str],
    metadata: Mapping[str, str],
    mtp_metadata: Mapping[str, str],
) -> Plan:
    packed = _packed(config, mtp_metadata)
    recipe = choose_recipe(config, options)
    by_mlx = metadata.get("format") == "mlx"
    plan = make_plan(names, config, recipe, options.mtp, packed=packed, written_by_mlx=by_mlx)
    if options.mtp != "only" and not options.dequantize and any(job.packed for job in plan.jobs):
        raise RequestError("the source is quantised; --dequantize unpacks it", field="hf_path")
    return plan


def _write_checkpoint(options: Options, source: Source, plan: Plan) -> None:
    """Carry out a plan in its own directory, from wherever an earlier run got to."""
    directory = options.mlx_path
    _make_directory(directory)
    facts = Facts(
        options.hf_path,
        source.revision or options.revision,
        options.command,
        _versions(),
        source_license(source.path),
    )
    identity = {"source": source.fingerprint, "recipe": plan.digest(), "mlx version": version("mlx")}
    record: dict[str, Any] = {
        "source": {"name": facts.name, "revision": facts.revision},
        "recipe": plan.recipe.name,
    }
    with locked(directory):
        journal = open_journal(directory, identity, record)
        small = small_files(source.path, source.config.raw, plan)
        name = options.upload_repo or directory.resolve().name
        card = {CARD: model_card(plan, source.config, facts, name).encode()}
        # A finished directory's card may have figures and its owner's words: only what is gone is written.
        missing = {
            name: content
            for name, content in {**small, **card}.items()
            if not (journal.is_complete and (directory / name).exists())
        }
        if not _write_files(source, plan, journal) and not missing:
            print(f"{directory} is complete already")
        for name, content in missing.items():
            write_atomically(directory / name, content)
        if not journal.is_complete:
            journal.is_complete = True
            journal.save()
        if options.verify:
            verify_small(small, directory)
            _verify(plan, source, directory, journal.checksums)


def _write_files(source: Source, plan: Plan, journal: Journal) -> bool:
    """Write the shards that the journal does not list or that are gone; returns whether there were any."""
    left: list[tuple[Shard, Mapping[str, str]]] = []
    needed = 0
    for shard in plan.files:
        metadata: Mapping[str, str] = SHARD_METADATA
        if shard is plan.sidecar:
            metadata = sidecar_metadata(plan, source.revision or source.fingerprint)
        size = TensorWriter.planned_size(shard.tensors, metadata)
        if not journal.is_done(shard.name, size):
            left.append((shard, metadata))
            # What a killed run left of this shard is overwritten.
            partial = journal.directory / f".{shard.name}.partial"
            needed += size - (partial.stat().st_blocks * 512 if partial.exists() else 0)
    if not left:
        return False
    _check_space(journal.directory, needed)
    with _progress(sum(source_bytes(shard, source.entries) for shard, _ in left)) as bar:
        for shard, metadata in left:
            path = journal.directory / shard.name
            bar.set_postfix_str(shard.name, refresh=False)
            written = write_shard(path, shard, plan.recipe.dtype, source.entries, metadata, bar.update)
            journal.record(shard.name, written)
    return True


def _add_sidecar(options: Options, source: Source, plan: Plan) -> None:
    """Write only the MTP layers into a directory that may be somebody else's; no file of it changes."""
    directory, sidecar = options.mlx_path, plan.sidecar
    assert sidecar is not None
    path = directory / sidecar.name
    metadata = sidecar_metadata(plan, source.revision or source.fingerprint)
    written: Mapping[str, str] = {}
    with locked(directory):
        if _has_sidecar(path, sidecar, metadata):
            print(f"{path} is complete already")
        else:
            _check_space(directory, plan.nbytes)
            with _progress(source_bytes(sidecar, source.entries)) as bar:
                written = write_shard(path, sidecar, plan.recipe.dtype, source.entries, metadata, bar.update)
        if options.verify:
            _verify(plan, source, directory, {sidecar.name: written})


def _has_sidecar(path: Path, sidecar: Shard, metadata: Mapping[str, str]) -> bool:
    """Whether the sidecar is there as it would be written. Raises RequestError for any other one."""
    found = list(path.parent.glob(SIDECARS))
    if not found:
        return False
    if found == [path]:
        header = read_header(path)
        tensors = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
        if header.metadata == metadata and tensors == {t.name: (t.dtype, t.shape) for t in sidecar.tensors}:
            return True
    raise RequestError(f"{path.parent} has MTP layers already, in {min(found).name}", field="mlx_path")


def _verify(plan: Plan, source: Source, directory: Path, checksums: Mapping[str, Mapping[str, str]]) -> None:
    print("verifying every tensor against the source:")
    with _progress(sum(job.weight.num_parameters for job in plan.jobs), unit=" weights") as bar:
        reports = verify(plan, source, directory, checksums, bar.update)
    for kind, report in reports.items():
        print(
            f"  {kind:<10} {report.tensors:>5} tensors, worst relative error {report.worst:.5f} "
            f"of {report.allowed:.5f} allowed ({report.worst_tensor})"
        )


def _check_neighbour(directory: Path, config: ModelConfig) -> None:
    """The heads fit beside a checkpoint only if it is of the same model and its own files have none."""
    if not (directory / "config.json").exists():
        raise RequestError(
            f"{directory} has no config.json; --mtp only adds to a checkpoint", field="mlx_path"
        )
    other = ModelConfig.from_hf(read_json(directory / "config.json"))
    if backbone_weights(other) != backbone_weights(config):
        raise RequestError(f"{directory} holds a model of another shape", field="mlx_path")
    names: Collection[str] = read_index(directory) or {
        name for file in directory.glob("model*.safetensors") for name in read_header(file).entries
    }
    if mtp_names(names, config):
        raise RequestError(f"{directory} has MTP layers already", field="mlx_path")


def _files(index: Mapping[str, str], wanted: frozenset[str] | None) -> list[str]:
    """The shards that hold what is wanted."""
    return sorted({file for name, file in index.items() if wanted is None or name in wanted})


def _packed(config: ModelConfig, mtp_metadata: Mapping[str, str]) -> dict[str, Quantization]:
    """How the modules of an MLX source are packed, by path, if they have scales; {} for an original."""
    backbone = QuantizationSettings.from_block(config.quantization, module_path)
    heads = mtp_settings(mtp_metadata, backbone)
    choices = {weight.path: backbone.choice(weight.path) for weight in backbone_weights(config)}
    choices |= {weight.path: heads.choice(weight.path) for weight in mtp_weights(config)}
    return {path: choice for path, choice in choices.items() if choice is not None}


def _make_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"{directory} is a file", field="mlx_path")
    directory.mkdir(parents=True, exist_ok=True)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CapacityError(
            f"{directory} needs {readable_bytes(needed)} more, its disk has {readable_bytes(free)} free"
        )


def _progress(total: int, unit: str = "B") -> "tqdm[Any]":
    return tqdm(total=total, unit=unit, unit_scale=True, smoothing=0.05, mininterval=0.5)


def _versions() -> dict[str, str]:
    names = ("mlx-step35", "mlx", "mlx-lm")
    return {"Python": platform.python_version(), **{name: version(name) for name in names}}
