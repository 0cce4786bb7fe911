"""pi0.5 as lerobot publishes it, and PaliGemma as Google does: read whole or not at all, under exactly the published
names; the student and the action expert that start from them compute what the originals compute."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import helpers_policy as h
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

import common
import distill
import finetune
from common import InputError

PART, WIDTH, MLP = "paligemma_with_expert.", 48, 96  # the expert's
HEADS = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")
TEXTS = ["close the oven", "put the building block into the corresponding slot, slowly"]


@pytest.fixture(scope="module", autouse=True)
def micro():
    yield from h.micro_models()


@pytest.fixture(scope="module", autouse=True)
def micro_pi05(micro):
    """pi0.5 one size smaller, with the words of our small tokenizer."""
    ids = {f"{k}_token_id": common.make_tokenizer().convert_tokens_to_ids(f"<{k}>") for k in ("pad", "bos", "eos")}
    text = h.MICRO["paligemma-micro"]["text"] | ids | {"vocab_size": len(common.make_tokenizer())}
    expert = {"hidden_size": WIDTH, "intermediate_size": MLP, "action_dim": 8}
    full = dict(common.PI05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "PI05", h.MICRO["paligemma-micro"] | {"text": text, "expert": expert})
        patch.setitem(finetune.EXPERT_SIZES, "300m", {k: expert[k] for k in ("hidden_size", "intermediate_size")})
        yield full


class AdaptiveNorm(nn.Module):
    """adaRMS of pi0.5's expert: what is normalised, and the gate of the branch behind it."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, when: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.dense(when).chunk(3, -1)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift, gate


class Pi05(nn.Module):
    """pi0.5 made of transformers' own classes, with the module names of lerobot's: its state_dict has their keys."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        both = self.paligemma_with_expert = nn.Module()
        both.paligemma, self.tokenizer = common.load_vlm("paligemma-micro")
        text = both.paligemma.config.text_config
        same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
        expert = tf.GemmaConfig(hidden_size=WIDTH, intermediate_size=MLP, initializer_range=WIDTH**-0.5,
                                tie_word_embeddings=False, **{k: getattr(text, k) for k in same})  # fmt: skip
        both.gemma_expert = tf.GemmaForCausalLM(expert)
        both.gemma_expert.model.embed_tokens = None
        for name, _ in list(both.gemma_expert.named_modules()):
            if name.endswith("norm"):
                both.gemma_expert.set_submodule(name, AdaptiveNorm(WIDTH))
        self.action_in_proj, self.action_out_proj = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def expert(self, tokens: Tensor, cache: DynamicCache, mask: Tensor, positions: Tensor, time: float) -> Tensor:
        """The expert's hidden states (B, n, WIDTH) at one time of the flow, layer by layer."""
        embedded = []
        for i in range(WIDTH // 2):
            period = 0.004 * (4.0 / 0.004) ** (i / (WIDTH // 2 - 1))
            embedded.append(2 * math.pi * time / period)
        embedded = torch.tensor([math.sin(a) for a in embedded] + [math.cos(a) for a in embedded])
        when = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))
        gemma, x = self.paligemma_with_expert.gemma_expert.model, tokens
        turns = gemma.rotary_emb(x, position_ids=positions)
        for layer in gemma.layers:
            y, gate = layer.input_layernorm(x, when)
            y, _ = layer.self_attn(hidden_states=y, position_embeddings=turns, attention_mask=mask,
                                   past_key_values=cache)  # fmt: skip
            x = x + gate * y
            y, gate = layer.post_attention_layernorm(x, when)
            x = x + gate * layer.mlp(y)
        return gemma.norm(x, when)[0]


def published_names(model: Pi05) -> dict[str, Tensor]:
    """Its tensors as in the published file: the embedding is the head, and the vision tower has one more level."""
    tensors = {k.replace(".vision_tower.", ".vision_tower.vision_model."): v for k, v in model.state_dict().items()}
    del tensors[f"{PART}paligemma.model.language_model.embed_tokens.weight"]
    return {k: v.clone() for k, v in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], tokenizer=None, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"type": "pi05", "paligemma_variant": "gemma_2b"}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-0000{shards}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {k: file for file, ks in files.items() for k in ks}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, keys in files.items():
        save_file({k: tensors[k].contiguous() for k in keys}, folder / file)
    return folder


@pytest.fixture(scope="module")
def pi05(micro_pi05) -> Pi05:
    return Pi05().eval()


@pytest.fixture(scope="module")
def base(pi05, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pi05") / "base", published_names(pi05), pi05.tokenizer)


def student_args(source: Path | str) -> distill.Args:
    return replace(distill.TINY, student=str(source))


def policy_args(init: Path | str, **changes) -> finetune.Args:
    changes = dict(expert="300m", latents=(3, 2), chunk=4, execute=2, cameras=("primary",)) | changes
    return replace(finetune.TINY, init=str(init), **changes)


def left_over(report: str) -> set[str]:
    """The names in the report's first line, of one source."""
    return set(report.splitlines()[0].rpartition("(")[2].rstrip(")").split(", "))


# -- the published layout ----------------------------------------------------------------------------------------------


def full_size() -> dict[str, tuple[int, ...]]:
    """lerobot/pi05_base: 812 tensors, written down by hand."""
    tower, text = f"{PART}paligemma.model.vision_tower.vision_model", f"{PART}paligemma.model.language_model"
    expert = f"{PART}gemma_expert"
    names = {
        f"{tower}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{tower}.embeddings.patch_embedding.bias": (1152,),
        f"{tower}.embeddings.position_embedding.weight": (256, 1152),
        f"{tower}.post_layernorm.weight": (1152,), f"{tower}.post_layernorm.bias": (1152,),
        f"{PART}paligemma.model.multi_modal_projector.linear.weight": (2048, 1152),
        f"{PART}paligemma.model.multi_modal_projector.linear.bias": (2048,),
        f"{text}.norm.weight": (2048,), f"{PART}paligemma.lm_head.weight": (257152, 2048),
        f"{expert}.lm_head.weight": (257152, 1024), f"{expert}.model.norm.dense.weight": (3072, 1024),
        f"{expert}.model.norm.dense.bias": (3072,), "action_in_proj.weight": (1024, 32), "action_in_proj.bias": (1024,),
        "action_out_proj.weight": (32, 1024), "action_out_proj.bias": (32,), "time_mlp_in.weight": (1024, 1024),
        "time_mlp_in.bias": (1024,), "time_mlp_out.weight": (1024, 1024), "time_mlp_out.bias": (1024,),
    }  # fmt: skip
    for i in range(27):
        layer = f"{tower}.encoder.layers.{i}"
        for part in ("layer_norm1", "layer_norm2"):
            names |= {f"{layer}.{part}.weight": (1152,), f"{layer}.{part}.bias": (1152,)}
        for part in "qkv":
            names |= {f"{layer}.self_attn.{part}_proj.weight": (1152, 1152)}
            names |= {f"{layer}.self_attn.{part}_proj.bias": (1152,)}
        names |= {f"{layer}.self_attn.out_proj.weight": (1152, 1152), f"{layer}.self_attn.out_proj.bias": (1152,)}
        names |= {f"{layer}.mlp.fc1.weight": (4304, 1152), f"{layer}.mlp.fc1.bias": (4304,)}
        names |= {f"{layer}.mlp.fc2.weight": (1152, 4304), f"{layer}.mlp.fc2.bias": (1152,)}
    for stem, w, m in ((text, 2048, 16384), (f"{expert}.model", 1024, 4096)):
        for i in range(18):
            layer = f"{stem}.layers.{i}"
            for k, shape in {"self_attn.q": (2048, w), "self_attn.k": (256, w), "self_attn.v": (256, w),
                             "self_attn.o": (w, 2048), "mlp.gate": (m, w), "mlp.up": (m, w),
                             "mlp.down": (w, m)}.items():  # fmt: skip
                names[f"{layer}.{k}_proj.weight"] = shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                if stem == text:
                    names[f"{layer}.{norm}.weight"] = (w,)
                else:
                    names |= {f"{layer}.{norm}.dense.weight": (3 * w, w), f"{layer}.{norm}.dense.bias": (3 * w,)}
    return names


@pytest.mark.parametrize("prefix", ["", "model."])
def test_every_published_tensor_has_its_place(micro_pi05, monkeypatch, prefix):
    """At full size, without values: the published names and shapes are the student's VLM and the expert, complete."""
    monkeypatch.setattr(common, "PI05", micro_pi05)
    monkeypatch.setitem(finetune.EXPERT_SIZES, "300m", {"hidden_size": 1024, "intermediate_size": 4096})
    shapes = full_size()
    assert len(shapes) == 812 and sum(map(math.prod, shapes.values())) == 3_616_757_520
    with torch.device("meta"):
        tensors = {prefix + k: torch.empty(shape) for k, shape in shapes.items()}
        monkeypatch.setattr(common, "published_tensors", lambda *_: tensors)
        vlm, rest = common.pi05_tensors("x")
        model = tf.PaliGemmaForConditionalGeneration(
            common.paligemma_config(micro_pi05["vision"], micro_pi05["text"], image_token=257152)
        )
        there = {k.replace("vision_tower.vision_model.", "vision_tower."): tuple(v.shape) for k, v in vlm.items()}
        ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        tied = {"model.language_model.embed_tokens.weight": (257152, 2048)}
        assert there | tied == ours and model.lm_head.weight is model.get_input_embeddings().weight
        tokenizer = common.make_tokenizer()
        policy = finetune.VLA(distill.Student(model, tokenizer, (64, 64), 2048), "300m", 16, 2)
        common.load_tensors(policy.expert, finetune.pi05_expert(rest), "x")  # every name, every shape


# -- a round trip ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prefix,shards,dtype", [("", 1, torch.float32), ("model.", 3, torch.bfloat16)])
def test_round_trip(pi05, tmp_path, capsys, prefix, shards, dtype):
    """A checkpoint under the published names: the student's logits are those of the model it was written from."""
    tensors = {prefix + k: v.to(dtype) for k, v in published_names(pi05).items()}
    student = distill.build(student_args(write(tmp_path / "x", tensors, pi05.tokenizer, shards)), (3, 2), 48).eval()
    text = capsys.readouterr().out
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    original = Pi05().paligemma_with_expert.paligemma
    original.load_state_dict({k: v.to(dtype).float() for k, v in original.state_dict().items()})
    expected = distill.Student(original, pi05.tokenizer, (3, 2), 48).eval()
    images = h.pictures(2)
    _, logits, _ = student(images, TEXTS, ["lift it", "open the gripper"])
    assert torch.equal(logits, expected(images, TEXTS, ["lift it", "open the gripper"])[1]) and logits.std() > 0.1
    # The report adds up: the VLM, and what distillation has no use for.
    count = lambda values: f"{len(values)} tensors, {sum(p.numel() for p in values) / 1e6:.1f} M parameters"
    rest = [v for k, v in published_names(pi05).items() if not k.startswith(f"{PART}paligemma.")]
    assert f"x: loaded {count(list(student.vlm.parameters()))}; left over {count(rest)} (" in text
    assert left_over(text) == {f"{PART}gemma_expert"} | {f"{k}.{w}" for k in HEADS for w in ("weight", "bias")}
    assert f"new: {count([student.queries, *student.head.parameters()])} (queries, head.weight, head.bias)" in text


@torch.no_grad()
def test_the_expert_starts_as_pi05_at_its_first_step(pi05, base, capsys):
    """Adaptive norms folded at time 1: the same hidden states for the same tokens on the same cache, with padding."""
    model = finetune.build(policy_args(base)).eval()
    text = capsys.readouterr().out
    embeds, group, valid, positions = model.student.prefix(h.pictures(2), TEXTS)
    caches = [
        vlm(inputs_embeds=embeds, attention_mask=distill.attention_mask(group, valid), position_ids=positions,
            use_cache=True).past_key_values
        for vlm in (model.student.vlm.language_model, pi05.paligemma_with_expert.paligemma.model.language_model) * 2
    ]  # fmt: skip
    tokens = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = F.pad(valid, (0, 5), value=True)[:, None, None, :].expand(-1, -1, 5, -1)
    after = positions[:, -1:] + 1 + torch.arange(5)
    ours = model.expert(inputs_embeds=tokens, past_key_values=caches[0], position_ids=after, use_cache=True,
                        attention_mask=mask).last_hidden_state  # fmt: skip
    theirs = pi05.expert(tokens, caches[1], mask, after, time=1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (pi05.expert(tokens, caches[3], mask, after, time=0.5) - theirs).abs().max() > 0.1  # time does matter
    # Left over: the expert's head, which nothing reads, and the flow-matching heads for actions.
    count = lambda values: f"{len(values)} tensors, {sum(p.numel() for p in values) / 1e6:.1f} M parameters"
    loaded = [*model.student.vlm.parameters(), *model.expert.parameters()]
    assert f"base: loaded {count(loaded)}; left over 5 tensors" in text
    assert left_over(text) == {f"{PART}gemma_expert"} | {f"{k}.{w}" for k in HEADS[:2] for w in ("weight", "bias")}
    assert "expert" not in text.splitlines()[-1] and "student.queries, student.head, state_in" in text.splitlines()[-1]


def test_an_expert_of_another_size_stays_new(base, capsys):
    model = finetune.build(policy_args(base, expert="tiny"))
    text = capsys.readouterr().out
    assert model.expert.config.hidden_size == finetune.EXPERT_SIZES["tiny"]["hidden_size"]
    assert "time_mlp_in.weight" in left_over(text) and "expert.layers" in text.splitlines()[1]


def test_the_expert_beside_a_distilled_student(base, tmp_path, capsys):
    """--expert lerobot/pi05_base; the checkpoint that comes of it needs the file no more."""
    h.save_student(tmp_path / "run", h.make_student())
    args = policy_args(tmp_path / "run", expert=str(base))
    model = finetune.build(args)
    assert "base: loaded 35 tensors" in capsys.readouterr().out  # 3 layers of 11, and the last norm
    alone = finetune.build(policy_args(base, expert=str(base)))  # Table 4's baseline
    assert finetune.Args().expert == "lerobot/pi05_base" and finetune.expert_size(str(base)) == "300m"
    assert all(torch.equal(v, model.expert.state_dict()[k]) for k, v in alone.expert.state_dict().items())
    assert torch.equal(model.student.queries, distill.load_student(tmp_path / "run")[0].queries)
    meta = {"stage": "finetune", "student_config": model.student.config.to_dict(), "tokens": model.student.tokens,
            "latent_dim": model.student.head.out_features}  # fmt: skip
    common.save_checkpoint(tmp_path / "policy", 1, model, None, meta, model.student.tokenizer, h.process())
    found = common.find_checkpoint(tmp_path / "policy", "finetune")
    again = finetune.build(replace(args, expert=str(tmp_path / "gone")), found)
    common.load_weights(again, found)
    for source, why in ((tmp_path / "gone", ""), (tmp_path / "other", "it is another model")):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/config.json").write_text("{}")
        with pytest.raises(InputError, match=f"unknown --expert .*choose one of .*pi0.5 .*{why}"):
            finetune.build(replace(args, expert=str(source)))
    with pytest.raises(InputError, match="unknown --expert"):  # never random weights instead
        finetune.build(replace(args, expert=args.init))


# -- whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,shown",
    [
        ("paligemma.model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias", "encoder.layers.1.mlp.fc1.bias"),
        ("paligemma.model.language_model.layers.2.mlp.up_proj.weight", "model.language_model.layers.2.mlp.up_proj"),
        ("paligemma.lm_head.weight", "lm_head.weight"),
        ("gemma_expert.model.layers.0.input_layernorm.dense.weight", "layers.0.input_layernorm.dense.weight"),
        ("gemma_expert.lm_head.weight", "gemma_expert.lm_head.weight"),
        ("time_mlp_out.bias", "time_mlp_out.bias"),
    ],
)
def test_what_does_not_fit_is_named(pi05, tmp_path, name, shown):
    """One tensor too few, of another shape, or too many."""
    tensors = published_names(pi05)
    name = name if name in tensors else PART + name
    short = {k: v for k, v in tensors.items() if k != name}
    cases = [(short, f"[12] tensors missing .*{shown}"), (short | {name: torch.zeros(3, 5)}, rf"{shown}.*\(3, 5\)"),
             (tensors | {name.replace("weight", "odd").replace("bias", "odd"): torch.zeros(2)}, "1 left over .*odd")]
    for i, (bad, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            distill.build(student_args(write(tmp_path / str(i), bad, pi05.tokenizer)), (3, 2), 48)


def test_embedding_and_head_are_one_matrix(pi05, tmp_path):
    """Stored twice it may be, but not as two."""
    tensors, words = published_names(pi05), f"{PART}paligemma.model.language_model.embed_tokens.weight"
    table = tensors[f"{PART}paligemma.lm_head.weight"]
    model, _ = common.load_vlm(str(write(tmp_path / "twice", tensors | {words: table.clone()}, pi05.tokenizer)))
    assert model.lm_head.weight is model.get_input_embeddings().weight and torch.equal(model.lm_head.weight, table)
    alone = {k: v for k, v in tensors.items() if "paligemma.lm_head" not in k} | {words: table}
    model, _ = common.load_vlm(str(write(tmp_path / "alone", alone, pi05.tokenizer)))
    assert torch.equal(model.lm_head.weight, table)
    with pytest.raises(InputError, match="embed_tokens.weight and .*lm_head.weight differ"):
        common.load_vlm(str(write(tmp_path / "two", tensors | {words: table + 1}, pi05.tokenizer)))


def test_the_tokenizer(pi05, tmp_path, monkeypatch):
    """lerobot ships none: PaliGemma's, from the hub's cache or from beside the weights; and how to get it."""
    folder = write(tmp_path / "bare", published_names(pi05))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="without a tokenizer.*hf download google/paligemma-3b-pt-224 tokenizer.json"):
        common.load_vlm(str(folder))
    cache = tmp_path / "hub/models--google--paligemma-3b-pt-224"
    pi05.tokenizer.save_pretrained(cache / "snapshots/0123456789abcdef0123456789abcdef01234567")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    _, tokenizer = common.load_vlm(str(folder))
    assert tokenizer("close the oven").input_ids == pi05.tokenizer("close the oven").input_ids
    # The model by its hub name, too.
    repo = tmp_path / "hub/models--lerobot--pi05_base"
    shutil.copytree(folder, repo / "snapshots/0123456789abcdef0123456789abcdef01234567")
    shutil.copytree(cache / "refs", repo / "refs")
    assert distill.Args().student == "lerobot/pi05_base"
    assert common.load_vlm(distill.Args().student)[0].left_over.keys() == common.pi05_rest().keys()
    other = tmp_path / "bare/tokenizer_config.json"
    pi05.tokenizer.save_pretrained(folder)
    other.write_text(json.dumps(json.loads(other.read_text()) | {"eos_token": "<unk>"}))
    with pytest.raises(InputError, match="special tokens .*'eos': 3.*pi0.5's .*'eos': 2"):
        common.load_vlm(str(folder))


# -- PaliGemma ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_paligemma_as_published(pi05, tmp_path, capsys):
    """google/paligemma-3b-pt-224: older names, in shards, with the embedding and without the head."""
    vlm, folder = pi05.paligemma_with_expert.paligemma, tmp_path / "paligemma"
    names = {}
    for k, v in vlm.state_dict().items():
        k = k.replace("model.language_model.", "language_model.model.").replace("model.multi_modal", "multi_modal")
        names[k.replace("model.vision_tower.", "vision_tower.vision_model.")] = v.clone()
    del names["lm_head.weight"]
    write(folder, names, pi05.tokenizer, shards=3)
    vlm.config.save_pretrained(folder)
    student = distill.build(student_args(folder), (3, 2), 48).eval()
    assert f"loaded {len(names)} tensors" in (text := capsys.readouterr().out) and "left over 0 tensors" in text
    expected = distill.Student(vlm, pi05.tokenizer, (3, 2), 48).eval()
    arguments = (h.pictures(2), TEXTS, ["lift it", "open the gripper"])
    assert torch.equal(student(*arguments)[1], expected(*arguments)[1])
    path = next(folder.glob("*-00002-*"))
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 tensors missing .*{gone.split('.', 2)[-1].removeprefix('vision_model.')}"):
        distill.build(student_args(folder), (3, 2), 48)
