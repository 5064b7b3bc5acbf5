"""A model whose layers are read from disk when asked for and forgotten when dropped.

Checkpoints that load lazily are simply not evaluated before their turn. FP8 ones cannot be loaded; their
layers are unpacked slice by slice as the converter does it.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.config import ModelConfig
from mlx_step35.conversion.plan import Job, check_source, make_plan
from mlx_step35.conversion.source import Source, mtp_names, read_source
from mlx_step35.conversion.transform import read_weight
from mlx_step35.model import Model
from mlx_step35.mtp import MTP
from mlx_step35.recipes import uniform_recipe


class LayerStream:
    """One checkpoint, part by part. After a drop the part is gone; asking for it again is an error."""

    def __init__(self, path: Path) -> None:
        source = read_source(path)
        self._jobs: dict[str, Job] = {}
        self._source = source
        if any(entry.dtype == "F8_E4M3" for entry in source.entries.values()):
            self._model = self._unfilled(source)
        else:
            self._model = load_checkpoint(path)

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @property
    def _parts(self) -> Any:
        return self._model.model

    @property
    def num_mtp_layers(self) -> int:
        return 0 if self._model.mtp is None else self._model.mtp.num_layers

    def embed(self, ids: mx.array) -> mx.array:
        self._fill("model.embed_tokens.")
        return self._model.embed(ids)

    def layer(self, index: int) -> Any:
        self._fill(f"model.layers.{index}.")
        return _settled(self._model.layers[index])

    def drop_layer(self, index: int) -> None:
        self._drop(self._model.layers, index)

    def mtp_layers(self, index: int) -> MTP:
        """The MTP layers; of those still there only this one may be used."""
        self._fill(f"mtp.layers.{index}.")
        assert self._model.mtp is not None
        layers: MTP = self._model.mtp
        _settled(layers.layers[index])
        return layers

    def drop_mtp_layer(self, index: int) -> None:
        self._drop(self._model.mtp.layers, index)

    def norm(self, hidden: mx.array) -> Any:
        """The residual stream behind the last layer, as the head wants it."""
        self._fill("model.norm.")
        return self._parts.norm(hidden)

    def head(self, states: mx.array) -> mx.array:
        """Logits in float32 of what `norm` returned."""
        self._fill("lm_head.")
        tied = self.config.tie_word_embeddings
        logits = self._parts.embed_tokens.as_linear(states) if tied else self._model.lm_head(states)
        return mx.array(logits, mx.float32)

    def drop_embedding(self) -> None:
        """Forget the embedding, unless it is the head."""
        if not self.config.tie_word_embeddings:
            self._parts.embed_tokens = None
            mx.clear_cache()

    def _drop(self, layers: list[Any], index: int) -> None:
        layers[index] = None
        mx.clear_cache()

    def _unfilled(self, source: Source) -> Model:
        """A model with weights to come; what it has now is random, lazy and never evaluated."""
        config = source.config
        recipe = uniform_recipe(config, None)
        # As for a checkpoint that loads: heads are run where they are stored, whatever the config announces.
        has_mtp = bool(config.mtp_layers and mtp_names(source.entries, config))
        plan = make_plan(source.entries.keys(), config, recipe, "keep" if has_mtp else "drop")
        check_source(plan, source.entries)
        self._jobs = {job.weight.name: job for job in plan.jobs}
        model = Model(config)
        if plan.sidecar is not None:
            model.mtp = MTP(config)
        return model

    def _fill(self, prefix: str) -> None:
        """Read what begins so, if it was not read yet."""
        for name in [name for name in self._jobs if name.startswith(prefix)]:
            job = self._jobs.pop(name)
            on_cpu = mx.default_device().type == mx.DeviceType.cpu
            exact = on_cpu or job.weight.kind in ("router", "bias")
            dtype = mx.float32 if exact else mx.bfloat16
            pieces = []
            for _, array in read_weight(job, self._source.entries):
                # One rounding, as in a converted checkpoint, before any wider type.
                narrow = array if job.weight.kind in ("bias", "norm") else array.astype(mx.bfloat16)
                pieces.append(narrow.astype(dtype).reshape(-1, job.weight.shape[-1]))
                mx.eval(pieces[-1])
            weight = mx.concatenate(pieces).reshape(job.weight.shape)
            mx.eval(weight)
            self._model.load_weights([(name, weight)], strict=False)


def _settled(layer: Any) -> Any:
    """The layer with its weights read one after another.

    All at once, each would be there twice for a moment: as stored, and as the loader casts and turns it.
    """
    for weight in dict(tree_flatten(layer.parameters())).values():
        mx.eval(weight)
    return layer
