"""Published weights: folders and hub names as Hugging Face's libraries write them, in shards, loaded whole or not at
all, with a report; and the model that starts from them equals theirs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from test_lam import ARGS, CPU, SMALL_DC, SMALL_SANA, make_batch, right_padded

import common
import lam
from common import InputError

HUB = {"encoder": "OpenGVLab/InternVL3_5-2B-HF", "decoder": "Efficient-Large-Model/Sana_1600M_512px_diffusers"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Small models in the published layouts: InternVL3.5 (its head is not tied to its embeddings, the tensors are named
    as in older releases of transformers) and SANA's pipeline, in several safetensors files with an index."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    vlm, tokenizer = common.load_vlm("internvl-tiny")
    config = vlm.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    vlm = transformers.InternVLForConditionalGeneration(config)
    torch.nn.init.normal_(vlm.model.vision_tower.embeddings.position_embeddings, std=0.2)
    vlm.save_pretrained(root / "internvl", max_shard_size="500KB")
    tokenizer.save_pretrained(root / "internvl")
    sana = SanaTransformer2DModel(**SMALL_SANA)
    sana.save_pretrained(root / "sana/transformer", max_shard_size="100KB")
    AutoencoderDC(**SMALL_DC).save_pretrained(root / "sana/vae", max_shard_size="100KB")
    for folder in ("internvl", "sana/transformer", "sana/vae"):
        assert len(list((root / folder).glob("*.safetensors"))) > 2
        assert len(list((root / folder).glob("*.safetensors.index.json"))) == 1
    return root


def args_for(root: Path, **changes) -> lam.Args:
    args = replace(ARGS, encoder=str(root / "internvl"), decoder=str(root / "sana"), freeze_vision=True)
    return replace(args, **changes)


def index_of(folder: Path) -> dict[str, str]:
    """{tensor: file} of a sharded checkpoint."""
    return json.loads(next(folder.glob("*.safetensors.index.json")).read_text())["weight_map"]


# -- equal to the published models -------------------------------------------------------------------------------------


def test_starts_as_the_published_models(published):
    """The scene stream as diffusers' SANA, the encoder as Hugging Face's InternVL, both loaded by themselves."""
    torch.manual_seed(2)
    model = lam.build(args_for(published)).eval()
    sana = SanaTransformer2DModel.from_pretrained(published / "sana/transformer", low_cpu_mem_usage=False).eval()
    x, current, s = torch.randn(2, 32, 2, 2), torch.randn(2, 32, 2, 2), torch.tensor([0.2, 0.9])
    z_sce, z_mot = torch.randn(2, 4, 128), torch.randn(2, 6, 128)
    with torch.no_grad():
        caption = model.decoder.to_caption(z_sce + model.decoder.places[0])
        expected = sana(x, encoder_hidden_states=caption, timestep=s * 1000).sample
        velocity, _ = model.decode(x, current, s, (z_sce, z_mot))
    torch.testing.assert_close(velocity, expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 0.05  # not equal because both are empty

    vlm = transformers.InternVLForConditionalGeneration.from_pretrained(published / "internvl").eval()
    seen: list[torch.Tensor] = []
    model.encoder.vlm.language_model.register_forward_hook(lambda m, i, out: seen.append(out.last_hidden_state))
    batch = make_batch()
    with torch.no_grad():
        model.encode(batch["video"], batch["instruction"])
        ids, kind = model.encoder.tokenize(batch["instruction"], batch["video"].shape[1])
        mask = right_padded(ids, kind, model.encoder.tokenizer)
        # Theirs takes words, not embeddings: the queries become the embeddings of words that do not occur.
        free = [i for i in range(len(model.encoder.tokenizer)) if i not in set(ids.flatten().tolist())][:10]
        vlm.get_input_embeddings().weight[free] = model.encoder.queries
        ids[kind == 2] = torch.tensor(free).repeat(len(ids))
        pixels = common.normalize_pixels(batch["video"].flatten(0, 1), "internvl", torch.float32)
        out = vlm(input_ids=ids, pixel_values=pixels, attention_mask=mask, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(seen[0][mask.bool()], out.hidden_states[-1][mask.bool()], rtol=1e-5, atol=1e-5)


def test_report(published, capsys):
    """What was loaded, new and left over adds up, tensor by tensor; the unused language head is named."""
    model = lam.build(args_for(published))
    text = capsys.readouterr().out
    vlm = {n: p for n, p in model.named_parameters() if n.startswith("encoder.vlm")}
    sana = {n: p for n, p in model.named_parameters() if n.startswith("decoder.sana")}
    million = lambda tensors: f"{sum(p.numel() for p in tensors) / 1e6:.1f} M"
    head = model.encoder.config.text_config.vocab_size * 128 / 1e6
    assert f"internvl: loaded {len(vlm)} tensors, {million(vlm.values())} parameters; " \
           f"left over 1 tensors, {head:.1f} M parameters (lm_head.weight)" in text  # fmt: skip
    assert len(vlm) + 1 == len(index_of(published / "internvl"))
    assert len(sana) == len(index_of(published / "sana/transformer"))
    assert f"sana: loaded {len(sana)} tensors, {million(sana.values())} parameters; left over 0 tensors" in text
    new = [p for n, p in model.named_parameters() if n not in vlm and n not in sana]
    assert f"new: {len(new)} tensors, {million(new)} parameters (encoder.queries, encoder.head, decoder.queries" in text
    lam.build(ARGS)
    assert capsys.readouterr().out == ""  # nothing pretrained, nothing to report


@pytest.mark.parametrize("stored", [True, False])
def test_a_head_tied_to_the_embeddings(published, tmp_path, stored):
    """Smaller releases tie the head to the embeddings, and store it or not: neither is left over."""
    folder = shutil.copytree(published / "internvl", tmp_path / "vlm")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    head, words = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    where = index_of(folder)
    table = load_file(folder / where[words])[words]
    change(folder, head, lambda d: d.update({head: table.clone()}) if stored else d.pop(head))
    model, _ = common.load_vlm(str(folder))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, table)
    text = common.report_loading(model, {"x": model})
    assert "left over 0 tensors" in text and "new: 0 tensors" in text


def test_hub_names(published, tmp_path, monkeypatch):
    """The defaults of lam.py are hub names: found in the hub's cache without a connection, as on a cluster's nodes."""
    for name, folder in ((HUB["encoder"], "internvl"), (HUB["decoder"], "sana")):
        repo = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(published / folder, repo / "snapshots/0123456789abcdef0123456789abcdef01234567")
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    assert (lam.Args().encoder, lam.Args().decoder) == tuple(HUB.values())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = lam.build(args_for(published, **HUB))
    local = lam.build(args_for(published))
    assert all(torch.equal(v, local.encoder.vlm.state_dict()[k]) for k, v in model.encoder.vlm.state_dict().items())
    assert all(torch.equal(v, local.decoder.sana.state_dict()[k]) for k, v in model.decoder.sana.state_dict().items())
    assert lam.load_codec(HUB["decoder"], 32, CPU).vae.config.latent_channels == 32
    with pytest.raises(InputError, match="no vision-language model at 'nobody/nothing'.*local folder"):
        lam.build(args_for(published, encoder="nobody/nothing"))


# -- whole or not at all -----------------------------------------------------------------------------------------------

SOURCES = {  # part: (folder, a tensor in the middle, as the libraries call it, the loader)
    "internvl": ("internvl", "language_model.model.layers.1.mlp.up_proj.weight",
                 "language_model.layers.1.mlp.up_proj.weight", lambda root: common.load_vlm(str(root / "internvl"))),
    "transformer": ("sana/transformer", "transformer_blocks.1.ff.conv_depth.weight",
                    "transformer_blocks.1.ff.conv_depth.weight", lambda root: lam.build(args_for(root))),
    "vae": ("sana/vae", "encoder.conv_out.weight", "encoder.conv_out.weight",
            lambda root: lam.load_codec(str(root / "sana"), 32, CPU)),
}  # fmt: skip


def change(folder: Path, name: str, edit) -> None:
    """Edits the tensors of the shard that holds, or should hold, this tensor."""
    path = folder / index_of(folder)[name]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", SOURCES)
def test_weights_that_do_not_fit_are_named(published, tmp_path, part):
    folder, name, shown, load = SOURCES[part]
    spoils = [
        (lambda f: change(f, name, lambda d: d.pop(name)), rf"1 tensors missing \['[a-z.]*{shown}'\], 0 left over"),
        (lambda f: change(f, name, lambda d: d.update(odd=torch.zeros(2))), r"1 left over \['odd'\], 0 of another"),
        (lambda f: change(f, name, lambda d: d.update({name: torch.zeros(3, 5)})),
         rf"0 tensors missing \[\], 0 left over \[\], 1 of another shape \(there, here\) .*{shown}': \(\(3, 5\)"),
        (lambda f: (f / index_of(f)[name]).unlink(), "no .*(InternVL|SanaTransformer|AutoencoderDC|vision-language)"),
        (lambda f: (f / index_of(f)[name]).write_bytes(b"x" * 99), "no .*(SanaTransformer|AutoencoderDC|vision-lang)"),
        (lambda f: next(f.glob("*.index.json")).write_text("{"), "no .*(SanaTransformer|AutoencoderDC|vision-lang)"),
    ]  # fmt: skip
    load(published)
    for i, (spoil, message) in enumerate(spoils):
        shutil.copytree(published, tmp_path / str(i))
        spoil(tmp_path / str(i) / folder)
        with pytest.raises(InputError, match=message):
            load(tmp_path / str(i))


def test_weights_of_another_architecture(published, tmp_path):
    """A config.json of another size, a model of another family, an autoencoder of another pipeline."""
    root = shutil.copytree(published, tmp_path / "other")
    path = root / "internvl/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] = 300
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"6 of another shape .*0.mlp.down_proj.weight': \(\(128, 256\), \(128, 300"):
        lam.build(args_for(root))
    path.write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(InputError, match="is a 'llava' model; this stage needs one of .*internvl"):
        lam.build(args_for(root))
    path.write_text(json.dumps({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "x.Y"}}))  # the custom layout
    with pytest.raises(InputError, match="no vision-language model at"):
        lam.build(args_for(root))
    with pytest.raises(InputError, match="makes 32 channels, its transformer takes 16"):
        lam.load_codec(str(published / "sana"), 16, CPU)


def test_the_full_size_path_learns(published):
    """Velocities of deep latents, a frozen vision encoder and recomputed layers, as in the paper's run: eight futures
    are told apart, and the vision encoder stays as it was published."""
    args = replace(args_for(published), freeze_vision=True, checkpointing=True)
    torch.manual_seed(0)
    model, codec = lam.build(args).train(), lam.load_codec(args.decoder, 32, CPU)
    batch = make_batch(8)
    counts = lam.valid_counts(batch["action_mask"])
    frozen = {n: p.clone() for n, p in model.encoder.vlm.vision_tower.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(20):
        loss, parts = lam.micro_step(model, codec, batch, counts, args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts)
    for name in ("frame", "motion", "gripper"):
        assert losses[-1][name] < 0.7 * losses[0][name], (name, losses[0][name], losses[-1][name])
    assert all(torch.equal(p, frozen[n]) for n, p in model.encoder.vlm.vision_tower.named_parameters())
