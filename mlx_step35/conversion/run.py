"""Carrying out a conversion: fetch, plan, write or resume, verify, publish."""

import json
import platform
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_step35.checkpoint.headers import read_index, read_json
from mlx_step35.checkpoint.names import parameter_name, text_name
from mlx_step35.config import ModelConfig
from mlx_step35.conversion.card import CARD, Facts, model_card, source_license
from mlx_step35.conversion.hub import announced, check_upload, fetch_shards, fetch_small, upload
from mlx_step35.conversion.journal import Journal, locked, open_journal
from mlx_step35.conversion.options import Options, choose_recipe
from mlx_step35.conversion.outputs import SHARD_METADATA, sidecar_metadata, write_outputs
from mlx_step35.conversion.plan import MTPChoice, Plan, Shard, check_source, make_plan
from mlx_step35.conversion.report import describe
from mlx_step35.conversion.source import Source, read_source
from mlx_step35.conversion.stream import source_bytes, write_shard
from mlx_step35.conversion.tensorfile import TensorWriter, write_atomically
from mlx_step35.conversion.verify import verify
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
    index = read_index(path)
    wanted = _names(index, config, options.mtp)
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
    packed = _packed(config, names, mtp_metadata)
    if packed and options.mtp != "only" and not options.dequantize:
        raise RequestError("the source is quantised; --dequantize unpacks it", field="hf_path")
    recipe = choose_recipe(config, options)
    by_mlx = metadata.get("format") == "mlx"
    return make_plan(names, config, recipe, options.mtp, packed=packed, written_by_mlx=by_mlx)


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
        if journal.is_complete:
            print(f"{directory} is complete already")
        else:
            _write_files(source, plan, journal)
            write_outputs(source.path, directory, source.config.raw, plan)
            name = options.upload_repo or directory.resolve().name
            card = model_card(plan, source.config, facts, name)
            write_atomically(directory / CARD, card.encode())
            journal.is_complete = True
            journal.save()
        if options.verify:
            _verify(plan, source, directory, journal.checksums)


def _write_files(source: Source, plan: Plan, journal: Journal) -> None:
    """Write the shards that the journal does not list."""
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
    _check_space(journal.directory, needed)
    with _progress(sum(source_bytes(shard, source.entries) for shard, _ in left)) as bar:
        for shard, metadata in left:
            path = journal.directory / shard.name
            bar.set_postfix_str(shard.name, refresh=False)
            written = write_shard(path, shard, plan.recipe.dtype, source.entries, metadata, bar.update)
            journal.record(shard.name, written)


def _add_sidecar(options: Options, source: Source, plan: Plan) -> None:
    """Write only the MTP layers into a directory that may be somebody else's; no file of it changes."""
    directory, sidecar = options.mlx_path, plan.sidecar
    assert sidecar is not None
    _make_directory(directory)
    _check_neighbour(directory, source.config)
    with locked(directory):
        if any(directory.glob("mtp*.safetensors")):
            raise RequestError(f"{directory} has MTP layers already", field="mlx_path")
        _check_space(directory, plan.nbytes)
        with _progress(source_bytes(sidecar, source.entries)) as bar:
            metadata = sidecar_metadata(plan, source.revision or source.fingerprint)
            path = directory / sidecar.name
            written = write_shard(path, sidecar, plan.recipe.dtype, source.entries, metadata, bar.update)
        if options.verify:
            _verify(plan, source, directory, {sidecar.name: written})


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
    """The heads fit beside a checkpoint only if it is of the same model and has none yet."""
    if not (directory / "config.json").exists():
        return
    other = ModelConfig.from_hf(read_json(directory / "config.json"))
    if backbone_weights(other) != backbone_weights(config):
        raise RequestError(f"{directory} holds a model of another shape", field="mlx_path")
    texts = [text_name(name) or "" for name in read_index(directory)]
    if any(parameter_name(text, config.num_layers, False).is_mtp for text in texts):
        raise RequestError(f"{directory} has MTP layers already", field="mlx_path")


def _files(index: Mapping[str, str], wanted: frozenset[str] | None) -> list[str]:
    """The shards that hold what is wanted."""
    return sorted({file for name, file in index.items() if wanted is None or name in wanted})


def _names(index: Mapping[str, str], config: ModelConfig, mtp: MTPChoice) -> frozenset[str] | None:
    """The MTP layers' tensors, if those are all that is wanted; None for everything."""
    if mtp != "only":
        return None
    texts = {stored: text_name(stored) or "" for stored in index}
    found = [
        stored for stored, text in texts.items() if parameter_name(text, config.num_layers, False).is_mtp
    ]
    # With none found, reading everything lets the plan say what is missing.
    return frozenset(found) or None


def _packed(
    config: ModelConfig, names: Collection[str], mtp_metadata: Mapping[str, str]
) -> dict[str, Quantization]:
    """How an MLX source packed its modules, by path; {} for an original."""
    settings = QuantizationSettings.from_block(config.quantization)
    block = QuantizationSettings.from_block(json.loads(mtp_metadata.get("quantization", "null")))
    packed = {}
    for weights, chosen in ((backbone_weights(config), settings), (mtp_weights(config), block)):
        for weight in weights:
            choice = chosen.choice(weight.path)
            if choice is not None and f"{weight.path}.scales" in names:
                packed[weight.path] = choice
    return packed


def _make_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"{directory} is a file", field="mlx_path")
    directory.mkdir(parents=True, exist_ok=True)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CapacityError(
            f"{directory} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free"
        )


def _progress(total: int, unit: str = "B") -> "tqdm[Any]":
    return tqdm(total=total, unit=unit, unit_scale=True, smoothing=0.05, mininterval=0.5)


def _versions() -> dict[str, str]:
    names = ("mlx-step35", "mlx", "mlx-lm")
    return {"Python": platform.python_version(), **{name: version(name) for name in names}}
