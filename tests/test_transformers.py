"""Do compressed transformers of Hugging Face generate, train, save and load as they did?"""

import json

import pytest
import torch
from cases_own import PairEmbedding, PairLinear
from torch import nn

import rankfold as rf
from rankfold import hub
from rankfold.errors import RankfoldError
from rankfold.layers import LowRankLinear, is_factorised, registered
from tests.cases_models import params, same_state, state, told

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


@pytest.fixture(autouse=True, scope="module")
def transformers_know_rankfold():
    hub.register()


TOKENS = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def llama():
    config = transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **WORDS))


def bert():
    config = transformers.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config)


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, vocab_size=60))


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


MODELS = {
    "llama": (llama, {"input_ids": TOKENS}),
    "gpt2": (gpt2, {"input_ids": TOKENS}),
    "bert": (bert, {"input_ids": TOKENS}),
    "t5": (t5, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
    "vit": (vit, {"pixel_values": IMAGES}),
}
LANGUAGE = ("llama", "gpt2")


def made(name):
    make, example = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), example


def compressed(name, share=0.7, **options):
    """Every layer that can be replaced, at the same share of its parameters."""
    model, example = made(name)
    small, plan = rf.compress(model, example=example, budget=rf.Budget(params=share), **told(**options, rule="uniform"))
    return model, small, plan, example


def logits(model, example):
    with torch.no_grad():
        return model(**example).logits


REPLACED = {
    "llama": [f"model.layers.1.{p}" for p in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")],
    "gpt2": [f"transformer.h.1.{p}" for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    "bert": [f"bert.encoder.layer.1.{p}" for p in ("attention.self.query", "intermediate.dense", "output.dense")],
    "t5": ["encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.1.EncDecAttention.q"],
    "vit": ["classifier"],
}


@pytest.mark.parametrize("name", MODELS)
def test_projections_are_replaced_and_the_model_is_not_changed(name):
    model, example = made(name)
    before = state(model)
    small, plan = rf.compress(
        model, example=example, budget=rf.Budget(params=0.7), planning=rf.Planning(rule="uniform")
    )
    same_state(model, before)
    assert params(small) == plan.params <= 0.7 * params(model)
    planned = {key for key, choice in plan.layers.items() if choice.method == "svd"}
    assert planned >= set(REPLACED[name]) - {"classifier"}
    assert len(planned) >= 8 or name == "t5"
    assert not is_ours(model.config)
    assert logits(small, example).isfinite().all()


def is_ours(config):
    return "quantization_config" in config.to_dict()


def test_grouped_queries_keep_their_widths():
    _, small, plan, _ = compressed("llama", 0.9, include="*self_attn*")
    attention = small.model.layers[0].self_attn
    assert (attention.k_proj.in_features, attention.k_proj.out_features) == (32, 16)
    assert attention.q_proj.out_features == 32
    assert plan.layers["model.layers.0.self_attn.k_proj"].method == "svd"


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_uses_its_cache_as_before(name):
    _, small, _, _ = compressed(name)
    cached = small.generate(TOKENS, **GENERATE)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, small.generate(TOKENS, **GENERATE, use_cache=False))


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_full_rank_generates_what_the_dense_model_does(name):
    model, example = made(name)
    layers = {key: rf.Choice("svd", rank=16 if "k_proj" in key or "v_proj" in key else 32) for key in REPLACED[name]}
    small = rf.apply(model, rf.Plan(layers))
    torch.testing.assert_close(logits(small, example), logits(model, example), rtol=1e-3, atol=1e-4)
    assert torch.equal(small.generate(TOKENS, **GENERATE), model.generate(TOKENS, **GENERATE))


def test_compressing_a_model_leaves_transformers_as_it_was(monkeypatch, tmp_path):
    auto = pytest.importorskip("transformers.quantizers.auto")
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    for known in tables:
        monkeypatch.delitem(known, "rankfold")
    _, small, _, example = compressed("bert")
    small.save_pretrained(tmp_path)
    assert not any("rankfold" in known for known in tables)
    loaded = hub.from_pretrained(tmp_path)
    assert all("rankfold" in known for known in tables)
    torch.testing.assert_close(logits(loaded, example), logits(small, example), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_wrote_is_loaded_again(name, tmp_path):
    _, small, _, example = compressed(name)
    small.save_pretrained(tmp_path)
    automatic = getattr(transformers, small.config.architectures[0]).from_pretrained(tmp_path)
    for loaded in (hub.from_pretrained(tmp_path), automatic):
        assert type(loaded) is type(small)
        torch.testing.assert_close(logits(loaded, example), logits(small, example), rtol=0, atol=0)
        assert params(loaded) == params(small)
        loaded.half().float()  # refused for what transformers takes to be quantised
        loaded.train()(**example).logits.sum().backward()
    loaded.eval().save_pretrained(tmp_path / "again")
    again = hub.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert next(again.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_a_densified_model_is_one_of_theirs_again(name, tmp_path):
    model, small, _, example = compressed(name)
    dense = rf.densify(small)
    assert [type(module) for module in dense.modules()] == [type(module) for module in model.modules()]
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, example), logits(small, example), rtol=1e-4, atol=1e-5)


def test_the_body_of_a_model_is_loaded_without_its_head_and_with_another(tmp_path):
    _, small, _, example = compressed("bert")
    small.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    expected = small.bert(**example).last_hidden_state
    torch.testing.assert_close(body(**example).last_hidden_state, expected, rtol=0, atol=0)
    body.save_pretrained(tmp_path / "body")
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "body")
    assert isinstance(other.bert.encoder.layer[0].attention.self.query, LowRankLinear)
    torch.testing.assert_close(other.bert(**example).last_hidden_state, expected, rtol=0, atol=0)


def test_compression_on_data_counts_the_tokens_that_the_mask_says(tmp_path):
    """Whatever stands in the padding, the same layers come out; and the result is saved and loaded as any other."""
    model, _ = made("bert")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    smalls = []
    for fill in (2, 50):
        words = torch.where(mask.bool(), TOKENS, fill)
        batches = [
            {"input_ids": words, "attention_mask": mask},
            {"input_ids": words.flip(0), "attention_mask": mask.flip(0)},
        ]
        body = model.bert
        small, plan = rf.compress(
            body,
            batches,
            budget=rf.Budget(params=0.7),
            include="encoder.*",
            planning=rf.Planning(mask="attention_mask"),
        )
        smalls.append(small)
    assert plan.metric == "outputs"
    for key, value in smalls[0].state_dict().items():
        torch.testing.assert_close(smalls[1].state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)
    small.save_pretrained(tmp_path)
    loaded = hub.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS)[0], small(TOKENS)[0])


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = made("bert")[0].bert, nn.Linear(32, 8)

    def forward(self, input_ids):
        return self.head(self.encoder(input_ids).last_hidden_state)


def test_a_model_inside_another_knows_its_own_layers(tmp_path):
    small, _ = rf.compress(Wrapped().eval(), example=TOKENS, budget=rf.Budget(params=0.7))
    small.encoder.save_pretrained(tmp_path)
    loaded = hub.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS)[0], small.encoder(TOKENS)[0], rtol=0, atol=0)


def test_plans_on_top_of_plans_are_all_remembered(tmp_path):
    model, example = made("llama")
    names = REPLACED["llama"][:2]
    for name in names:
        model = rf.apply(model, rf.Plan({name: rf.Choice("svd", rank=4)}))
    model.save_pretrained(tmp_path)
    loaded = hub.from_pretrained(tmp_path)
    assert all(is_factorised(loaded.get_submodule(name)) for name in names)
    torch.testing.assert_close(logits(loaded, example), logits(model, example), rtol=0, atol=0)


def tied(name):
    """A model whose head has the weight of its embedding, and the names of the two."""
    model, example = made(name)
    if name != "llama":
        return model, example, *HEADS[name]
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model, example, *HEADS[name]


HEADS = {
    "llama": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_tied_head_stays_tied_from_saving_to_densifying(name, tmp_path):
    model, example, table, head = tied(name)
    small, plan = rf.compress(model, example=example, budget=rf.Budget(params=0.95), include=head)
    assert (plan.layers[table].method, plan.layers[head].reason) == ("svd", f"follows {table!r}, whose weight it has")
    assert params(small) == plan.params
    small.tie_weights()
    small.save_pretrained(tmp_path / "small")
    automatic = type(model).from_pretrained(tmp_path / "small")
    for loaded in (hub.from_pretrained(tmp_path / "small"), automatic):
        assert loaded.get_submodule(head).down is loaded.get_input_embeddings().down
        assert params(loaded) == plan.params
        torch.testing.assert_close(logits(loaded, example), logits(small, example))
    if name in LANGUAGE:
        assert torch.equal(automatic.generate(TOKENS, **GENERATE), small.generate(TOKENS, **GENERATE, use_cache=False))
    dense = rf.densify(automatic)
    assert params(dense) == params(model)
    dense.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense")
    assert again.get_submodule(head).weight is again.get_input_embeddings().weight
    torch.testing.assert_close(logits(again, example), logits(small, example), rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_loaded_without_its_head_and_with_it(tmp_path):
    model, example, table, _ = tied("gpt2")
    small = rf.apply(model, rf.Plan({table: rf.Choice("svd", rank=8)}))
    small.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(body(**example)[0], small.transformer(**example)[0])
    body.save_pretrained(tmp_path / "body")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    torch.testing.assert_close(logits(whole, example), logits(small, example))


def test_ties_are_kept_and_said():
    _, small, plan, _ = compressed("gpt2", exclude="lm_head")
    assert small.lm_head.weight is small.transformer.wte.weight
    assert plan.layers["transformer.wte"].reason == "excluded"


def damaged(config):
    plan = config["quantization_config"]["plan"]["layers"]
    name = next(iter(plan))
    return name, plan


def renamed(folder):
    config = json.loads((folder / "config.json").read_text())
    name, plan = damaged(config)
    plan["nowhere"] = plan.pop(name)
    (folder / "config.json").write_text(json.dumps(config))


def another_rank(folder):
    config = json.loads((folder / "config.json").read_text())
    name, plan = damaged(config)
    del plan[name]
    (folder / "config.json").write_text(json.dumps(config))


def without_plan(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "unknown layer": (renamed, "nowhere"),
    "a layer less": (another_rank, "does not fit its plan"),
    "no plan": (without_plan, "no plan"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_no_dense_model_with_random_weights_is_returned(case, tmp_path):
    damage, said = DAMAGES[case]
    compressed("bert")[1].save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(rf.RankfoldError, match=said):
        hub.from_pretrained(tmp_path)


def test_a_model_that_transformers_quantised_is_refused():
    model, _ = made("vit")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(rf.RankfoldError, match="before quantising"):
        rf.apply(model, rf.Plan({"classifier": rf.Choice("svd", rank=1)}))


def test_timms_attention_is_planned():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    small, plan = rf.compress(model, example=IMAGES, budget=rf.Budget(params=0.7))
    assert "blocks.0.attn.qkv" in plan.layers
    assert small(IMAGES).shape == (2, 3)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_layers_of_ones_own_are_saved_and_loaded(name, tmp_path):
    """Conv1D among them, and embeddings with a tied head."""
    with registered(PairLinear, PairEmbedding):
        _, small, _, example = compressed(name, methods="pair")
        small.save_pretrained(tmp_path)
        loaded = hub.from_pretrained(tmp_path)
        assert any(type(module) is PairEmbedding for module in loaded.modules())
        torch.testing.assert_close(logits(loaded.eval(), example), logits(small, example), rtol=0, atol=0)
    with pytest.raises(RankfoldError, match="registered with rankfold.layers.register, got 'pair'"):
        hub.from_pretrained(tmp_path)
