"""``Quantizer`` (prepare, calibrate or train, convert) and the one-line ``quantize``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..analysis.inputs import check_model
from ..nn.base import set_note
from ..nn.surgery import Ignore, all_names, check_ignore, forbid_fast_path, ignored, replace
from ..nn.untouched import untouched
from .algorithms import check_algorithms
from .calibration import Forward, Shapes, evaluating, example_run, modules_of, own_run, run_batches
from .calls import Calls, recording
from .configs import QuantizationConfig
from .copying import copy_model
from .crossover import Crossover, slower
from .fake_quantize import ActivationQuantizer, layer_quantizer
from .fold import fold_pairs, foldable, has_batch_norm
from .fuse import fuse as fuse_layers
from .layers import ConfigMap, choose_layers, float_twin, open_packed
from .prepare import Qat, config_of, prepare_layer, prepared_layers, strip_layer
from .scheme import check_bool
from .types import Layer

Config = QuantizationConfig | ConfigMap


class Quantizer:
    """Quantizes a model in three steps.

    - ``config``: a config for all layers, or a mapping from layer names, patterns or types to configs (the last match wins; layers without
      a match stay as they are), for mixed precision
    - ``ignore``: names, patterns (``"encoder.*"``), types or modules to leave alone
    - ``fold_bn``: fold BatchNorms into the layers before them first
    - ``crossover``: None: every layer that can be int8 becomes int8, be it for the memory alone. "measure": ``convert`` leaves those in
      float that are slower in int8 on this machine (a few milliseconds per kind of layer, on the shapes of ``example_inputs`` if given).
      "table": the same without measuring, by a shipped table, so that the result does not depend on the machine's mood. The note of a
      layer left in float says why
    - ``fuse``: at ``convert``, take ReLU, ReLU6, GELU, SiLU and Hardswish modules into the layers before them, and let static int8
      convolutions hand int8 to the next one; see ``docs/quantization.md``

    >>> q = Quantizer(Int8Static(observer="percentile"), ignore=["head"])
    >>> model = q.prepare(model, example_inputs); q.calibrate(model, data); model = q.convert(model)
    """

    def __init__(
        self, config: Config, *, ignore: Ignore = (), fold_bn: bool = True, crossover: Crossover | None = None, fuse: bool = True
    ) -> None:
        check_config("Quantizer", config)
        self.config = dict(config) if isinstance(config, Mapping) else config
        self.ignore = ignore if isinstance(ignore, (str, type, nn.Module)) else list(ignore)  # looked through once per model
        self.fold_bn = fold_bn
        self.crossover = _check_crossover("Quantizer", crossover)
        check_bool("Quantizer", "fuse", fuse)
        self.fuse = fuse
        self._example_inputs: Any = None
        self._shapes: Shapes = {}
        self._calls: Calls | None = None
        self._ignored: list[Any] | None = None

    def prepare(self, model: nn.Module, example_inputs: Any = None, *, qat: bool | Qat = False, inplace: bool = False) -> nn.Module:
        """Copy the model, fold BatchNorms and put the simulation onto every layer that will be quantized.

        - ``example_inputs``: a tensor, a tuple of positional or a mapping of keyword arguments. The model runs once on it, and layers
          that are never called (their owner reads the weight itself) are left alone. What the run calls decides where BatchNorms are
          folded and layers fused in code that cannot be traced. It also tells ``calibrate`` what a batch holds.
        - ``qat``: False for post-training quantization: the model computes in float until calibrated. True or "ste": the simulation is
          on, ready for training, with straight-through gradients; static activation ranges follow the data in training mode.
          "lsq": scales are parameters, too, and learn (calibrate before training).
        - ``inplace``: change and return ``model`` itself; if False it is not touched.

        Make the optimizer after this call. Layers that stay float get a note with the reason. Raises ``ValueError`` if no layer can be
        quantized, weights hold NaN or Inf, or the model is prepared already.
        """
        where = "prepare"
        check_model(where, model)
        mode = _check_qat(where, qat, self.config)
        if prepared_layers(model):
            raise ValueError(f"{where}: model must not be prepared already, call convert first")
        ignore = check_ignore(where, model, self.ignore)
        with untouched(model):  # reading a parametrized weight may change buffers
            chosen, kept = choose_layers(where, model, self.config, ignore, qat=mode is not None)
        shapes: Shapes = {}
        if example_inputs is None:
            calls = own_run(where, model)
        else:
            shapes, calls = example_run(where, model, example_inputs, chosen)
            for name in [name for name in chosen if name not in shapes]:
                kept[name] = "left as it is: the model did not call it on example_inputs"
                del chosen[name]
            if not chosen:
                raise ValueError(f"{where}: model must call a layer that can be quantized on example_inputs, it called none")
        paths = _by_path(model, ignore)
        # From here on nothing is refused.
        if not inplace:
            model = copy_model(model)
        model = open_packed(model, chosen)
        pairs, reasons = foldable(model, calls, paths) if self.fold_bn else ({}, {})
        fold_pairs(model, pairs, reasons)
        for name, config in chosen.items():
            prepare_layer(name, model.get_submodule(name), config, mode)
            forbid_fast_path(model, model.get_submodule(name.rpartition(".")[0]))
        for name, reason in kept.items():
            set_note(model.get_submodule(name), reason)
        self._example_inputs, self._shapes, self._ignored, self._calls = example_inputs, shapes, paths, calls
        return model

    def calibrate(
        self, model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, progress: bool | None = None
    ) -> nn.Module:
        """Find the ranges of static activations: run the float model over ``data`` and observe. Changes ``model`` and returns it.

        ``data``: batches as a loader yields them: tensors, ``(inputs..., labels)`` or mappings; labels are not passed on. A single
        tensor is one batch. ``forward(model, batch)`` for anything else. Calibrating again starts afresh. Afterwards the model
        simulates int8. Nothing runs if no layer has static activations.

        Raises ``ValueError`` for no data and for NaN or Inf in a layer's input, naming the layer, and leaves the ranges as they were.
        """
        where = "calibrate"
        layers = _prepared(where, model)
        if not any(not part.scheme.dynamic for part in modules_of(model, ActivationQuantizer).values()):
            return model
        with _observing(model) as static, recording(model) as calls:
            run_batches(where, model, data, example_inputs=self._example_inputs, forward=forward, progress=progress)
            reached = [part for part in static.values() if part.observer.has_data()]
            if not reached:
                raise ValueError(f"{where}: data must reach a prepared layer, it reached none of {len(static)}")
            for part in reached:
                part.calculate_qparams()
        self._calls = calls | (self._calls or set())
        for layer in layers.values():
            layer_quantizer(layer).enabled = _is_ready(layer)
        for part in modules_of(model, ActivationQuantizer).values():
            part.quantizing = part.ready
        return model

    def convert(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Replace the prepared layers by quantized ones; the result computes the same integers as the simulation.

        Layers that calibration never reached, and with ``crossover`` those that int8 would slow down, stay float, with a note. Raises
        ``RuntimeError`` if nothing was calibrated.
        ``inplace``: change ``model`` itself (its root is still a new module if it is a single layer); if False it is not touched.
        """
        _prepared("convert", model)
        parts = modules_of(model, ActivationQuantizer).values()
        if parts and not any(part.ready for part in parts):
            raise RuntimeError("convert: model must be calibrated first, call Quantizer.calibrate (or train it after prepare(qat=True))")
        if not inplace:
            model = copy_model(model)
        layers = prepared_layers(model)
        ready = {layer: config_of(layer) for layer in layers.values() if _is_ready(layer)}
        made = {layer: config.convert(layer) for layer, config in ready.items() if not config.simulated}
        reasons = dict.fromkeys(layers.values(), "left as it is: calibration data never reached it")
        if self.crossover is not None:
            for name, layer in layers.items():
                config = ready.get(layer)
                if config is None or not config.promises_speed:
                    continue
                reason = slower(float_twin(layer), made[layer], self._shapes.get(name, ()), self.crossover)
                if reason is not None:
                    reasons[layer] = reason
                    del made[layer], ready[layer]
        if self.fuse:
            names, entries = all_names(model), self.ignore if self._ignored is None else self._ignored
            keep = lambda module: any(ignored(path, module, entries) for path in names[module])  # noqa: E731
            model, made = fuse_layers(model, made, keep, self._calls)
        # All new layers exist; nothing below can fail.
        for layer, config in ready.items():
            if config.simulated:
                config.convert(layer)
        for layer in layers.values():
            if layer not in ready:
                strip_layer(layer)
                set_note(layer, reasons[layer])
        for layer, new in made.items():
            if layer is model:
                strip_layer(layer)  # the caller may hold it still
            model = replace(model, layer, new)
        return model

    def freeze(self, model: nn.Module) -> nn.Module:
        """Stop observing: static activation ranges stay as they are for the rest of the training (its last epochs, usually)."""
        _prepared("freeze", model)
        for part in modules_of(model, ActivationQuantizer).values():
            part.observing = False
        return model


def quantize(
    model: nn.Module,
    config: Config,
    *,
    ignore: Ignore = (),
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    algorithms: Sequence[str | tuple[str, Mapping[str, Any]]] = (),
    fold_bn: bool = True,
    crossover: Crossover | None = None,
    fuse: bool = True,
    forward: Forward | None = None,
    inplace: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize a trained model and return it; the given model is not touched unless ``inplace``.

    - ``config``, ``ignore``, ``fold_bn``, ``crossover``, ``fuse``: see ``Quantizer``
    - ``example_inputs``, ``inplace``: see ``Quantizer.prepare``
    - ``data``: calibration batches, needed by ``Int8Static`` and by algorithms that look at activations; see ``Quantizer.calibrate``
    - ``algorithms``: names out of ``ALGORITHMS`` or ``(name, options)``, applied in the order in which they make sense: those that change
      the float model first ("cross_layer_equalization", "smoothquant"), then those that choose the rounding ("adaround", "gptq", "hqq"),
      then "bias_correction"

    Raises ``ValueError`` if no layer can be quantized, if data is missing, empty or not finite. With ``inplace`` an error leaves the
    model in float (BatchNorms may be folded already, which computes the same).

    >>> model = pycompress.quantize(model, pycompress.Int8Dynamic())
    >>> model = pycompress.quantize(model, pycompress.Int8Static(), data=loader, ignore=["head"])
    """
    where = "quantize"
    check_model(where, model)
    check_config(where, config)
    _check_crossover(where, crossover)
    check_bool(where, "fuse", fuse)
    steps = check_algorithms(where, algorithms)
    needs_data = [step.name for step in steps if step.needs_data]
    if data is None and (needs_data or _has_static(config)):
        reason = f"algorithm {needs_data[0]!r}" if needs_data else "static activations"
        raise ValueError(f"{where}: data must be calibration batches, as {reason} need them, got None")
    if isinstance(data, Iterator) and needs_data:
        data = list(data)  # passed over more than once
    entries = check_ignore(where, model, ignore)
    with untouched(model):  # reading a parametrized weight may change buffers
        chosen, _ = choose_layers(where, model, config, entries)
    entries = _by_path(model, entries)
    if not inplace:
        model = copy_model(model)
    model = open_packed(model, chosen)
    if fold_bn and has_batch_norm(model):
        calls = _example_calls(where, model, example_inputs, data if needs_data or _has_static(config) else None, forward)
        fold_pairs(model, *foldable(model, calls, entries))
    context = {"example_inputs": example_inputs, "forward": forward, "progress": progress}
    for step in steps:
        if step.stage == "before":
            step.run(model, data, ignore=entries, inplace=True, **context)
    quantizer = Quantizer(config, ignore=entries, fold_bn=False, crossover=crossover, fuse=fuse)
    model = quantizer.prepare(model, example_inputs, inplace=True)
    try:
        if data is not None:
            quantizer.calibrate(model, data, forward=forward, progress=progress)
        for step in steps:
            if step.stage != "before":
                step.run(model, data, **context)
        return quantizer.convert(model, inplace=True)
    except BaseException:
        for layer in prepared_layers(model).values():
            strip_layer(layer)
        raise


def _example_calls(where: str, model: nn.Module, example_inputs: Any, data: Any, forward: Forward | None) -> Calls | None:
    """The calls of a run on ``example_inputs`` or else on the first batch, if getting that batch changes nothing: not out of an iterator or
    a shuffling loader; or else on what the model brings."""
    if example_inputs is not None:
        return example_run(where, model, example_inputs)[1]
    if not isinstance(data, (Tensor, list, tuple)) or len(data) == 0:
        return own_run(where, model)
    with untouched(model), evaluating(model), recording(model) as calls:
        run_batches("calibrate", model, data if isinstance(data, Tensor) else data[:1], forward=forward, progress=False)
    return calls


def _by_path(model: nn.Module, ignore: Ignore) -> list[str | type | nn.Module]:
    """Modules in ignore belong to the given model, not to its copy: their paths hold in both."""
    return [path for entry in ignore for path in (all_names(model)[entry] if isinstance(entry, nn.Module) else [entry])]


def check_config(where: str, config: Any) -> None:
    if isinstance(config, Mapping):
        if not config:
            raise ValueError(f"{where}: config must name at least one layer, got an empty mapping")
        for pattern, one in config.items():
            named = isinstance(pattern, str) or (isinstance(pattern, type) and issubclass(pattern, nn.Module))
            if not named or not isinstance(one, QuantizationConfig):
                raise TypeError(f"{where}: config must map names or layer types to configs such as Int8Dynamic(), got {pattern!r}: {one!r}")
    elif not isinstance(config, QuantizationConfig):
        hint = f", write {config.__name__}()" if isinstance(config, type) and issubclass(config, QuantizationConfig) else ""
        raise TypeError(f"{where}: config must be a config such as Int8Dynamic(), got {config!r}{hint}")


def _check_qat(where: str, qat: bool | Qat, config: Config) -> Qat | None:
    if qat not in (False, True, "ste", "lsq"):
        raise ValueError(f"{where}: qat must be True, False, 'ste' or 'lsq', got {qat!r}")
    for one in config.values() if isinstance(config, Mapping) else [config]:
        if qat and not one.trainable:
            raise ValueError(f"{where}: qat must be False for {type(one).__name__}, which cannot be trained, got {qat!r}")
    return "ste" if qat is True else qat or None


def _check_crossover(where: str, crossover: Crossover | None) -> Crossover | None:
    if crossover not in (None, "measure", "table"):
        raise ValueError(f"{where}: crossover must be None, 'measure' or 'table', got {crossover!r}")
    return crossover


def _has_static(config: Config) -> bool:
    schemes = [one.activation_scheme() for one in (config.values() if isinstance(config, Mapping) else [config])]
    return any(scheme is not None and not scheme.dynamic for scheme in schemes)


def _prepared(where: str, model: nn.Module) -> dict[str, Layer]:
    check_model(where, model)
    layers = prepared_layers(model)
    if not layers:
        raise ValueError(f"{where}: model must be prepared, call Quantizer.prepare first")
    return layers


def _is_ready(layer: Layer) -> bool:
    return not hasattr(layer, "input_quantizer") or layer.input_quantizer.ready


@contextmanager
def _observing(model: nn.Module) -> Iterator[dict[str, ActivationQuantizer]]:
    """Float model, fresh observers, no training; yields the static quantizers. An error puts ranges and switches back."""
    parts: dict[str, ActivationQuantizer] = modules_of(model, ActivationQuantizer)
    weights = [layer_quantizer(layer) for layer in prepared_layers(model).values()]
    switches = [(part, part.observing, part.quantizing) for part in parts.values()]
    enabled = [(weight, weight.enabled) for weight in weights]
    static = {name: part for name, part in parts.items() if not part.scheme.dynamic}
    kept = {part: copy.deepcopy(part.observer) for part in static.values()}
    for part in parts.values():
        part.observing, part.quantizing = True, False
    for part in static.values():
        part.observer.reset()
    for weight, _ in enabled:
        weight.enabled = False
    try:
        with evaluating(model):
            yield static
    except BaseException:
        for part, observer in kept.items():
            part.observer = observer
        for part, _, quantizing in switches:
            part.quantizing = quantizing
        for weight, on in enabled:
            weight.enabled = on
        raise
    finally:
        for part, observing, _ in switches:
            part.observing = observing
