"""A LoRA with a start leaves the model as it was, trains from there, and is written out as an ordinary one."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import distributed, nn

import fishkern as fk
from tests.models.test_quantized import Repacking
from tests.support import zoo
from tests.support.exactness import assert_exact, paths
from tests.support.starts import start_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fishkern.integrations.lora import FILE, FOLDER, InitCallback, attach_init, lora_config, plain_lora  # noqa: E402
from tests.integrations.test_trainer import SHORT, Rows  # noqa: E402

FAMILIES = ["llama", "gpt2", "bert-classifier"]  # grouped-query attention, Conv1D, an encoder


def made(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    specimen = zoo.FAMILIES[family]()
    return specimen.model.to(dtype).eval(), specimen.batch(3, 7)


@torch.no_grad()
def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch).logits


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


@torch.no_grad()
def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Move the trained parameters as a training does, but fast."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return ((one.double() - other.double()).abs().max() / other.double().abs().max()).item()


@torch.no_grad()
def by_hand(model: nn.Module, init: fk.AdapterInit, adapted: nn.Module) -> nn.Module:
    """The oracle: the model in float64 with ``scaling (B A - B0 A0)`` added to its weights."""
    oracle = copy.deepcopy(model).double()
    for path, start in init.items():
        layer = adapted.base_model.model.get_submodule(path)
        A, B = (factors["default"].weight.double() for factors in (layer.lora_A, layer.lora_B))
        change = start.scaling * (B @ A - start.B.double() @ start.A.double())
        module = oracle.get_submodule(path)
        module.weight.add_(change if isinstance(module, nn.Linear) else change.T)
    return oracle


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("upcast", [True, False], ids=["float32 adapter", "the model's dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_leaves_the_output_to_the_bit(family, dtype, upcast, autocast):
    model, batch = made(family, dtype)
    init = start_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = logits(model, batch)
        adapted = attach_init(model, init, autocast_adapter_dtype=upcast)
        assert torch.equal(logits(adapted, batch), expected)
        adapted(**batch).loss.backward()
    trained = trained_parameters(adapted)
    assert len(trained) == 2 * len(init)
    for path in init:
        for factor, shape in (("lora_A", init[path].A.shape), ("lora_B", init[path].B.shape)):
            parameter = trained[f"base_model.model.{path}.{factor}.default.weight"]
            assert parameter.shape == shape
            assert parameter.grad.abs().max() > 0
    assert not torch.equal(logits(moved(adapted), batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_twin_computes_the_change_since_the_start(family):
    model, batch = made(family)
    original, init = copy.deepcopy(model), start_of(model)
    adapted = moved(attach_init(model, init))
    assert gap(logits(adapted, batch), logits(by_hand(original, init, adapted), batch)) < 1e-5


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0, 1e-5), (torch.bfloat16, 1e-3, 5e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_weights_leave_the_output_up_to_rounding(family, dtype, low, high):
    model, batch = made(family, dtype)
    original, init = copy.deepcopy(model), start_of(model)
    expected = logits(model, batch)
    adapted = attach_init(model, init, residual="weights")
    assert low < gap(logits(adapted, batch), expected) < high
    adapted(**batch).loss.backward()
    assert all(one.grad.abs().max() > 0 for one in trained_parameters(adapted).values())
    for path, start in init.items():
        module, layer = original.get_submodule(path), adapted.base_model.model.get_submodule(path)
        delta = start.delta() if isinstance(module, nn.Linear) else start.delta().T
        assert layer.base_layer.weight.dtype == dtype
        assert torch.allclose(layer.base_layer.weight.float(), module.weight.float() - delta, rtol=2**-7, atol=1e-6)
    assert gap(logits(moved(adapted), batch), logits(by_hand(original, init, adapted), batch)) < high


@pytest.mark.parametrize("pad", [False, True], ids=["patterns", "padded"])
@pytest.mark.parametrize("residual", ["twin", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_lora_is_the_trained_model_on_the_original_weights(tmp_path, family, residual, pad):
    model, batch = made(family)
    original, init = copy.deepcopy(model), start_of(model)
    adapted = moved(attach_init(model, init, residual=residual))
    assert gap(logits(adapted, batch), logits(original, batch)) > 1e-2
    folder = plain_lora(adapted, tmp_path / "new" / "lora", pad=pad)
    assert sorted(one.name for one in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), folder)
    assert gap(logits(loaded, batch), logits(adapted, batch)) < 1e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    layers = {path: loaded.base_model.model.get_submodule(path) for path in init}
    ranks = {path: layer.r["default"] for path, layer in layers.items()}
    if pad:
        assert set(ranks.values()) == {2 * max(init.ranks.values())} == {config["r"]} == {config["lora_alpha"]}
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
    else:
        assert ranks == {path: 2 * rank for path, rank in init.ranks.items()}
        assert {config["lora_alpha"] / config["r"]} == {init[path].scaling for path in init}


def test_a_failed_write_leaves_the_older_files(tmp_path):
    model, _ = made()
    adapted = attach_init(model, start_of(model))
    plain_lora(adapted, tmp_path)
    config = (tmp_path / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="names a folder"):
        plain_lora(adapted, tmp_path, pad=True)
    assert (tmp_path / "adapter_config.json").read_bytes() == config
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_of_one_batch_may_take_different_adapters():
    model, batch = made()
    original = copy.deepcopy(model)
    adapted = moved(attach_init(model, start_of(model)))
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mixed = logits(adapted.eval(), {**batch, "adapter_names": ["default", "__base__", "other"]})
    assert gap(mixed[0], logits(adapted, batch)[0]) < 1e-5
    assert gap(mixed[1], logits(original, batch)[1]) < 1e-5
    adapted.set_adapter("other")
    assert gap(mixed[2], logits(adapted, batch)[2]) < 1e-5
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert gap(logits(merged, batch), logits(adapted, batch)) < 1e-5


def test_small_changes_survive_a_cast_of_the_plain_lora_to_bfloat16(tmp_path):
    """As servers cast: the factors [A; A0], [B, -B0] themselves would lose what training has added."""
    model, batch = made()
    original, init = copy.deepcopy(model), start_of(model)
    adapted = moved(attach_init(model, init), 1e-3)
    change = logits(adapted, batch) - logits(original, batch)

    def after_cast(folder) -> torch.Tensor:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), folder)
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16().float()
        return logits(loaded, batch) - logits(original, batch)

    assert gap(after_cast(plain_lora(adapted, tmp_path / "plain")), change) < 0.02
    adapted.save_pretrained(tmp_path / "saved")
    assert gap(after_cast(tmp_path / "saved"), change) > 0.05


@pytest.mark.parametrize("residual", ["twin", "weights"])
def test_what_peft_saves_is_right_on_the_original_weights_and_trains_on(tmp_path, residual):
    model, batch = made()
    original, init = copy.deepcopy(model), start_of(model)
    adapted = moved(attach_init(model, init, residual=residual))
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    assert gap(logits(loaded, batch), logits(adapted, batch)) < 1e-5

    resumed = attach_init(copy.deepcopy(original), init, residual=residual)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(resumed.eval(), batch), logits(adapted, batch))
    expected = trained_parameters(adapted)
    assert trained_parameters(resumed).keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in trained_parameters(resumed).items())

    other = attach_init(copy.deepcopy(original), start_of(original, lambda n: 1 + n % 5, scaling=1.0))
    with pytest.raises(RuntimeError, match="was trained from another start"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    state = {name: one for name, one in adapted.named_parameters() if "lora_" in name}
    with pytest.raises(RuntimeError, match="its trained half first, then its initial values"):
        resumed.load_state_dict(state, strict=False)


@pytest.mark.parametrize("residual", ["twin", "weights"])
def test_patterns_hit_their_own_module_only(tmp_path, residual):
    """Paths that end in one another, or differ where a dot of a regular expression would not."""

    class Block(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "qq": nn.Linear(6, 6)}) for _ in range(12))
            self.encoder = Block(depth - 1) if depth else None
            self.decoder = Block(depth - 1) if depth else None

        def forward(self, x):
            for layer in self.layers:
                x = layer["qq"](x).tanh() + layer["q"](x)
            for part in (self.encoder, self.decoder):
                x = x if part is None else part(x)
            return x

    torch.manual_seed(0)
    model = Block(1)
    ranks = {"layers.1.q": 1, "layers.11.q": 2, "encoder.layers.1.q": 3, "decoder.layers.10.qq": 4}
    init = start_of(model, lambda n: 1 + n % 5, only=ranks.__contains__)
    init = fk.AdapterInit({path: init[path] for path in ranks}, digests=init.digests)
    original, x = copy.deepcopy(model), torch.randn(2, 6)
    adapted = attach_init(model, init, residual=residual)
    folder = plain_lora(moved(adapted), tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), folder)
    for one, times in ((adapted, 1), (loaded, 2)):
        modules = one.base_model.model.named_modules()
        layers = {path: module for path, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}
        sizes = {path: layer.lora_A["default"].weight.shape[0] for path, layer in layers.items()}
        assert sizes == {path: times * rank for path, rank in init.ranks.items()}
    assert gap(loaded(x), adapted(x)) < 1e-5
    zero = peft.get_peft_model(copy.deepcopy(original), lora_config(init, model=original))
    assert {name.split(".lora_A")[0] for name in trained_parameters(zero) if ".lora_A." in name} == {
        f"base_model.model.{path}" for path in ranks
    }


def test_the_config_alone_gives_an_ordinary_lora_with_these_ranks():
    model, batch = made()
    init, expected = start_of(model), logits(model, batch)
    config = lora_config(init, task_type="CAUSAL_LM", lora_dropout=0.1)
    assert config.lora_alpha / config.r == 2.0
    adapted = peft.get_peft_model(model, config)
    for path, start in init.items():
        layer = adapted.base_model.model.get_submodule(path)
        assert (layer.r["default"], layer.scaling["default"]) == (start.rank, start.scaling)
    assert torch.equal(logits(adapted, batch), expected)  # B = 0


@pytest.mark.parametrize("residual", ["twin", "weights"])
def test_rslora_keeps_the_scaling_of_the_start(tmp_path, residual):
    model, batch = made()
    original, init = copy.deepcopy(model), start_of(model)
    adapted = attach_init(model, init, residual=residual, use_rslora=True)
    assert gap(logits(adapted, batch), logits(original, batch)) < 1e-5
    moved(adapted).save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "saved", plain_lora(adapted, tmp_path / "plain")):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), folder)
        assert gap(logits(loaded, batch), logits(adapted, batch)) < 1e-5


def test_dropout_drops_the_change_since_the_start():
    model, batch = made()
    init, expected = start_of(model), logits(model, batch)
    adapted = attach_init(model, init, lora_dropout=0.5).train()
    assert torch.equal(logits(adapted, batch), expected)
    moved(adapted)
    assert not torch.equal(logits(adapted, batch), logits(adapted, batch))  # it does drop


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_takes_the_twin_into_account(family, safe):
    model, batch = made(family)
    original = copy.deepcopy(model)
    adapted = attach_init(model, start_of(model))
    adapted.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(adapted, batch), logits(original, batch))
    adapted.unmerge_adapter()
    expected = logits(moved(adapted), batch)
    adapted.merge_adapter(safe_merge=safe)
    assert gap(logits(adapted, batch), expected) < 1e-5
    adapted.unmerge_adapter()
    assert gap(logits(adapted, batch), expected) < 1e-5
    with adapted.disable_adapter():
        assert gap(logits(adapted, batch), logits(original, batch)) < 1e-5
    assert set(trained_parameters(adapted)) == {
        name for name, _ in adapted.named_parameters() if name.endswith(("_A.default.weight", "_B.default.weight"))
    }
    assert gap(logits(adapted.merge_and_unload(safe_merge=safe), batch), expected) < 1e-5


def test_disabled_and_unloaded_it_is_the_model():
    model, batch = made()
    original = copy.deepcopy(model)
    adapted = moved(attach_init(model, start_of(model)))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, batch), logits(original, batch))
    unloaded = adapted.unload()
    assert torch.equal(logits(unloaded, batch), logits(original, batch))
    assert all(torch.equal(one, original.get_parameter(name)) for name, one in unloaded.named_parameters())


def test_copies_casts_checkpointing_and_compiling():
    model, batch = made()
    init = start_of(model)
    adapted = attach_init(model, init)
    low, expected = copy.deepcopy(adapted).to(torch.bfloat16), made(dtype=torch.bfloat16)[0]
    assert torch.equal(logits(low, batch), logits(expected, batch))
    for parameter in trained_parameters(low).values():  # as TRL casts on quantised models, past the modules
        parameter.data = parameter.data.to(torch.float32)
    expected = logits(moved(adapted), batch)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(logits(other, batch), expected)
        assert gap(logits(other.merge_and_unload(), batch), expected) < 1e-5  # its own factors, not the original's
        assert torch.equal(logits(adapted, batch), expected)
    fresh = attach_init(made()[0], init)
    fresh.load_state_dict(adapted.state_dict())
    assert torch.equal(logits(fresh, batch), expected)

    def grads(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [one.grad.clone() for one in trained_parameters(adapted).values()]

    expected = grads(adapted.train())
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    assert all(map(torch.equal, grads(adapted), expected))
    adapted.gradient_checkpointing_disable()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, layer.in_features)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_it_trains_under_ddp_and_is_written_from_it(tmp_path):
    model, batch = made()
    original, init = copy.deepcopy(model), start_of(model)
    adapted = attach_init(model, init)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapted)
        wrapped(**batch).loss.backward()
        assert all(one.grad.abs().max() > 0 for one in trained_parameters(adapted).values())
        folder = plain_lora(moved(wrapped), tmp_path / "plain")
    finally:
        distributed.destroy_process_group()
    loaded = peft.PeftModel.from_pretrained(original, folder)
    assert gap(logits(loaded, batch), logits(adapted, batch)) < 1e-5


def test_initial_values_that_were_rounded_are_loaded_as_they_were(tmp_path):
    """A half that was cast, saved and loaded into a wider one is still beside its own initial values."""
    model, batch = made()
    original, init = copy.deepcopy(model), start_of(model)
    adapted = attach_init(model, init)
    for parameter in trained_parameters(adapted).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    adapted.save_pretrained(tmp_path)
    resumed = attach_init(copy.deepcopy(original), init)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert {one.dtype for one in trained_parameters(resumed).values()} == {torch.float32}
    assert torch.equal(logits(resumed, batch), logits(original, batch))


@pytest.mark.filterwarnings("error::UserWarning")  # PEFT itself calls what transformers deprecates
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_warned_of(tmp_path, family):
    model, _ = made(family)
    original, init = copy.deepcopy(model), start_of(model)
    folder = plain_lora(attach_init(model, init), tmp_path)
    peft.PeftModel.from_pretrained(original, folder)
    peft.get_peft_model(made(family)[0], lora_config(init, model=made(family)[0]))


def test_a_twin_is_read_in_the_dtype_of_the_trained_half():
    """TRL casts what requires a gradient on quantised models, and nothing else."""
    model, batch = made(dtype=torch.bfloat16)
    expected = logits(model, batch)
    adapted = attach_init(model, start_of(model))
    for parameter in trained_parameters(adapted).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits(adapted, batch), expected)


def quantised() -> tuple[nn.Module, dict]:
    """A LLaMA whose projections are stored as integers."""
    model, batch = made()
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            linear = getattr(parent, name)
            setattr(parent, name, Repacking(linear.out_features, linear.in_features))
    return model.train(), batch


def test_a_twin_leaves_quantised_weights_alone():
    model, batch = quantised()
    expected, init = logits(model, batch), start_of(model)
    with pytest.raises(ValueError, match=r"quantised weights \(model.layers.0.self_attn.q_proj, .*residual=\"twin\""):
        attach_init(model, init, residual="weights")
    adapted = attach_init(model, init)
    assert torch.equal(logits(adapted, batch), expected)
    adapted(**batch).loss.backward()
    assert all(one.grad.abs().max() > 0 for one in trained_parameters(adapted).values())


def refused(match: str, model: nn.Module | None = None, init: fk.AdapterInit | None = None, **options) -> None:
    """Check that it is refused in one line, and the model is as it was."""
    model = made()[0] if model is None else model
    init = start_of(model) if init is None else init
    before = {name: (one.clone(), one.requires_grad) for name, one in model.named_parameters()}
    modules, attributes = list(model.modules()), vars(model).keys() - {"_modules"}
    with pytest.raises(ValueError, match=match) as error:
        attach_init(model, init, **options)
    assert "\n" not in str(error.value)
    assert list(model.modules()) == modules
    assert vars(model).keys() - {"_modules"} == attributes
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name][0]), name
        assert one.requires_grad is before[name][1], name


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_refusals():
    init = start_of(made()[0])
    torch.manual_seed(1)
    refused("was made for other weights: model.layers.0.self_attn.q_proj", zoo.llama().model, init)
    refused("of its 14 modules are no linear maps", zoo.bert_classifier().model, init)
    adapted = peft.get_peft_model(made()[0], peft.LoraConfig(target_modules=["q_proj"]))
    refused("already has an adapter", adapted, init)
    refused("already has an adapter", attach_init(made()[0], init), init)
    refused("residual must be", residual="both")
    for option in ({"use_dora": True}, {"r": 4}, {"target_modules": ["q_proj"]}, {"lora_bias": True}):
        refused(f"a LoRA with a start takes no {next(iter(option))}", **option)
    refused("modules_to_save must name none", modules_to_save=["q_proj"])
    refused("before the model is wrapped in OptimizedModule", torch.compile(made()[0], backend="eager"), init)
    refused("would drop a part", residual="weights", lora_dropout=0.1)
    with pytest.raises(TypeError, match="init must be an AdapterInit"):
        attach_init(made()[0], {})
    with pytest.raises(TypeError, match="init must be an AdapterInit"):
        InitCallback("adapter_init.safetensors")
    with pytest.raises(ValueError, match="has no adapter with a start"):
        plain_lora(adapted, "nowhere")

    convolution = nn.Sequential(nn.Conv1d(3, 5, 2))
    refused("only linear modules can have a start, and 0 are convolutions", convolution)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    refused("other modules share the weight of 0", shared, residual="weights")


def test_residual_weights_are_not_subtracted_from_twice():
    model, _ = made()
    init = start_of(model)
    residual = attach_init(model, init, residual="weights").unload()
    for way in ("twin", "weights"):
        refused("was made for other weights", residual, init, residual=way)


@pytest.mark.parametrize("family", FAMILIES)
def test_fish_tuning_ranks_and_trains_the_trained_half(family):
    model, batch = made(family)
    adapted = attach_init(model, start_of(model))
    specimen = zoo.Specimen(moved(adapted), zoo.text_batch, zoo.FAMILIES[family]().loss)
    statistics = assert_exact(specimen, [batch])
    assert paths(statistics)["fused"] == set(statistics) == set(trained_parameters(adapted))
    selection = fk.fish_tuning(adapted.float(), [batch], density=0.3)
    before = {name: one.detach().clone() for name, one in adapted.named_parameters()}
    optimizer = fk.MaskedAdamW(adapted, selection, lr=1e-2)
    adapted(**batch).loss.backward()
    optimizer.step()
    for name, one in adapted.named_parameters():
        allowed = selection.mask(name) if name in selection else torch.zeros_like(one, dtype=torch.bool)
        assert not ((one != before[name]) & ~allowed).any(), name


def test_real_weights_in_bfloat16(shared_data):
    """What two adapters one after the other leave in the logits, a twin does not, and residual weights exceed."""
    folder = shared_data / "models" / "stories260K"

    def real() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    batch = {"input_ids": torch.randint(3, 500, (2, 17), generator=torch.Generator().manual_seed(0))}
    init = start_of(real(), lambda n: 1 + n % 7)
    expected = logits(real(), batch)
    for upcast in (True, False):
        adapted = attach_init(real(), init, autocast_adapter_dtype=upcast)
        assert torch.equal(logits(adapted, batch), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(adapted, batch), logits(real(), batch))
    assert 0.05 < (logits(attach_init(real(), init, residual="weights"), batch) - expected).abs().max() < 1

    two = peft.get_peft_model(real(), lora_config(init), autocast_adapter_dtype=False)
    two.add_adapter("start", lora_config(init), autocast_adapter_dtype=False)
    with torch.no_grad():
        for path, start in init.items():
            layer = two.base_model.model.get_submodule(path)
            for name, sign in (("default", 1), ("start", -1)):
                layer.lora_A[name].weight.copy_(start.A)
                layer.lora_B[name].weight.copy_(sign * start.B)
    two.base_model.set_adapter(["default", "start"])
    assert (logits(two, batch) - expected).abs().max() > 0.01


def classifier() -> nn.Module:
    torch.manual_seed(0)
    model = zoo.bert_classifier().model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trainer(model: nn.Module, folder, init: fk.AdapterInit, **options) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(**{**SHORT, "output_dir": str(folder), **options})
    return transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[InitCallback(init)])


@pytest.mark.parametrize("residual", ["twin", "weights"])
def test_the_trainer_saves_resumes_and_writes_the_plain_lora(tmp_path, residual):
    original = classifier()
    init = start_of(original)
    options = dict(residual=residual, modules_to_save=["classifier"])

    def attached(init: fk.AdapterInit) -> nn.Module:
        return attach_init(classifier(), init, **options)

    through = attached(init)
    trainer(through, tmp_path / "through", init).train()
    checkpoint = tmp_path / "through" / "checkpoint-2"
    assert fk.AdapterInit.load(checkpoint / FILE) == init
    resumed = attached(fk.AdapterInit.load(checkpoint / FILE))
    trainer(resumed, tmp_path / "cut", init).train(resume_from_checkpoint=str(checkpoint))
    expected = dict(through.named_parameters())
    assert all(torch.equal(one, expected[name]) for name, one in resumed.named_parameters())

    batch = {name: values for name, values in Rows().batch.items() if name != "labels"}
    expected = logits(through.eval(), batch)
    assert gap(expected, logits(original.eval(), batch)) > 1e-2
    for folder in (tmp_path / "through" / FOLDER, tmp_path / "cut" / FOLDER, tmp_path / "through" / "checkpoint-4"):
        loaded = peft.PeftModel.from_pretrained(classifier(), folder).eval()
        assert gap(logits(loaded, batch), expected) < 1e-5


def test_the_callback_refuses_another_start(tmp_path):
    init = start_of(classifier())
    other = start_of(classifier(), scaling=1.0)
    fewer = start_of(classifier(), only=lambda path: path.endswith("query"))
    with pytest.raises(ValueError, match="was given another start than this InitCallback"):
        trainer(attach_init(classifier(), init), tmp_path, other).train()
    for model in (attach_init(classifier(), fewer), peft.get_peft_model(classifier(), lora_config(init))):
        with pytest.raises(ValueError, match="InitCallback needs a model with the start"):
            trainer(model, tmp_path, init).train()
    trainer(attach_init(classifier(), init), tmp_path, init, max_steps=2).train()
    with pytest.raises(RuntimeError, match="was trained from another start"):
        trainer(attach_init(classifier(), other), tmp_path, other).train(resume_from_checkpoint=True)
