"""Save and load compressed Hugging Face models by their own methods: the plan is kept in the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from rankfold.errors import LayerError, RankfoldError, StoreError
from rankfold.layers import BLOCKS, PROJECTIONS, SeparateAttention, TiedHead, is_factorised, tied_methods
from rankfold.planning import Choice, Plan

# transformers lets a quantisation method replace layers before the weights are loaded, and finds it by this entry
ENTRY, METHOD = "quantization_config", "rankfold"
TIES = ("_tied_weights_keys", "all_tied_weights_keys")  # where their models keep the names of tied parameters
WEIGHT, FACTORS = ".weight", (".down.weight", ".up.weight")
BASE = "transformers.modeling_utils.PreTrainedModel"
Rebuild = Callable[[nn.Module, Plan], nn.Module]


def remember(model: nn.Module) -> None:
    """Note in the configuration of every Hugging Face model inside which layers are factorised.

    `save_pretrained` writes it to the folder, and `from_pretrained` needs `register` to read it.

    Raises:
        LayerError: transformers has quantised the model.
    """
    retie(model)
    for module in _pretrained(model):
        config: Any = module.config
        before, now = getattr(config, ENTRY, None), description(module)
        if now is not None and before is not None and not _is_ours(before):
            raise LayerError(f"{type(module).__name__} was quantised by transformers: factorise it before quantising")
        if now is not None:
            setattr(config, ENTRY, now)
        elif _is_ours(before):
            delattr(config, ENTRY)
            vars(config).pop(
                "_pre_quantization_dtype", None
            )  # of transformers 4: not JSON, and of no use without the entry


def description(model: nn.Module) -> dict[str, Any] | None:
    """Return the entry for the configuration of a model; None if all of its layers are dense."""
    blocks = [name for name, module in model.named_modules() if type(module) in BLOCKS.values()]
    if blocks:
        return {"quant_method": METHOD, "block": blocks[0]}
    layers = dict(_choices(model))
    return {"quant_method": METHOD, "plan": json.loads(Plan(layers).to_json())} if layers else None


def retie(model: nn.Module) -> None:
    """Update the names of tied parameters in every Hugging Face model inside: the factors of tied embeddings.

    `save_pretrained` then writes them once, and `from_pretrained` and `tie_weights` tie them.
    """
    for module in model.modules():
        if _is_pretrained(module):
            for entry in TIES:
                known = getattr(module, entry, None)
                if isinstance(known, dict | list) and (now := _retied(known, module)) != known:
                    setattr(module, entry, now)


def _retied(known: Any, model: nn.Module) -> Any:
    """Return the current names of tied parameters, {target: source} or a list of targets."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def whole(name: str) -> str:
        """Return the name of a weight from that of one of its factors."""
        layer = next((name.removesuffix(end) for end in FACTORS if name.endswith(end)), None)
        ours = _in_stages(modules.get(layer or ""))
        return f"{layer}{WEIGHT}" if layer and (ours or name.removesuffix(WEIGHT) not in modules) else name

    found: dict[str, str] = {}
    for target, source in known.items() if isinstance(known, dict) else dict.fromkeys(known, "").items():
        head, table = (whole(name).removesuffix(WEIGHT) for name in (target, source))
        if _in_stages(modules.get(head)):
            found |= {f"{head}{end}": f"{table}{end}" for end in FACTORS}
        else:
            found[whole(target)] = whole(source)
    return found if isinstance(known, dict) else list(found)


def _in_stages(module: Any) -> bool:
    """Tell whether a module is an embedding of two stages, or a head that shares those of one."""
    table = getattr(module, "dense_type", None) is nn.Embedding and module.method in tied_methods()
    return table or isinstance(module, TiedHead)


def plan_of(entry: Any) -> Plan:
    """Return the plan in a configuration.

    Raises:
        StoreError: there is none, or it has layers that replace whole blocks, which no plan can build.
        PlanError: the plan is damaged.
    """
    if not _is_ours(entry):
        raise StoreError("the configuration holds no plan of Rankfold: load the model as any other")
    held = entry if isinstance(entry, Mapping) else vars(entry)
    if "block" in held:
        raise StoreError(f"{held['block']!r} stands for a whole block, which from_pretrained cannot build")
    return Plan.from_json(json.dumps(held.get("plan")))


def register(rebuild: Rebuild) -> None:
    """Make `from_pretrained` of transformers build the layers named in a configuration, until the process ends.

    Args:
        rebuild: a function that returns the model with the plan's layers, without values.

    Raises:
        RankfoldError: transformers is missing or too old.
    """
    try:
        from transformers.quantizers import auto
        from transformers.quantizers.base import HfQuantizer
        from transformers.utils.quantization_config import QuantizationConfigMixin
    except ImportError as problem:
        raise RankfoldError(f"this needs transformers: pip install 'rankfold[hub]' ({problem})") from problem
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class RankfoldConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
        """The entry of the configuration."""

        def __init__(self, **entry: Any) -> None:
            plan_of(entry)
            vars(self).update(entry)

    class RankfoldLayers(HfQuantizer):  # type: ignore[misc, unused-ignore]
        """Replaces layers before the weights are loaded; the result does not count as quantised."""

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            plan = _fitting(plan_of(self.quantization_config), model)
            _tie(model)
            model._modules.update(rebuild(model, plan)._modules)
            retie(model)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            return model

        def postprocess_model(self, model: Any, **_: Any) -> None:
            for name in ("hf_quantizer", "is_quantized", "quantization_method"):
                vars(model).pop(name, None)
            remember(model)

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = RankfoldConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = RankfoldLayers


def _tie(model: Any) -> None:
    """Tie the weights of heads to the embeddings; transformers would do so only after loading."""
    for target, source in (getattr(model, TIES[1], None) or {}).items():
        (layer, _, name), table = target.rpartition("."), model.get_submodule(source.rpartition(".")[0])
        if isinstance(table, nn.Embedding):
            setattr(model.get_submodule(layer), name, table.weight)


def _is_ours(entry: Any) -> bool:
    held = entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", {})
    return held.get("quant_method") == METHOD


def _pretrained(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost Hugging Face models; those inside share their configuration."""
    if _is_pretrained(model):
        yield model
        return
    for child in model.children():
        yield from _pretrained(child)


def _is_pretrained(module: nn.Module) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == BASE for kind in type(module).__mro__)


def _choices(model: nn.Module) -> Iterator[tuple[str, Choice]]:
    for name, module in model.named_modules():
        layer: Any = module
        if is_factorised(layer):
            yield name, Choice(layer.method, layer.rank, dict(layer.options))
        elif isinstance(layer, SeparateAttention):
            dense = [part for part in PROJECTIONS if not is_factorised(getattr(layer, part))]
            yield from ((f"{name}.{part}", Choice("dense")) for part in dense)


def _fitting(plan: Plan, model: Any) -> Plan:
    """Return the plan with the names of its layers in this model, which may have gained or lost a head."""
    modules = dict(model.named_modules())
    attentions = [name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    names = modules.keys() | {f"{name}.{part}" for name in attentions for part in PROJECTIONS}
    prefix = f"{model.base_model_prefix}."
    inner = {name: name.removeprefix(prefix) for name in plan.layers if name not in names}
    if any(short in names and short != name for name, short in inner.items()):  # the base of the model that was saved
        return Plan({short: plan.layers[name] for name, short in inner.items() if short in names})
    outer = {name: name if name in names or prefix + name not in names else prefix + name for name in plan.layers}
    return Plan({outer[name]: choice for name, choice in plan.layers.items()})
