"""lam.py: the model against Hugging Face's and diffusers' own, its losses, gradients, ablations, sampling, loading."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from helpers_lam import TASKS
from safetensors.torch import load_file, save_file

import common
import lam
from common import GRIPPERS, MOTION, InputError

ARGS = replace(lam.TINY, frames=3, scene_tokens=4, motion_tokens=6, batch=2)
CPU = common.Process(0, 1, torch.device("cpu"), torch.float32)
CODEC = lam.load_codec(ARGS.decoder, 48, CPU)
SHAPE = (lam.SANA_SIZES[ARGS.decoder]["in_channels"], 64 // CODEC.factor, 64 // CODEC.factor)  # of 64 px in latents


@pytest.fixture(autouse=True)
def seeded():
    """The same weights in every test; one thread, which is faster for matrices this small on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_batch(samples: int = 2, frames: int = ARGS.frames, size: int = 64) -> dict:
    """Random frames and actions; two instructions of unequal length; right-arm columns valid."""
    g = torch.Generator().manual_seed(1)
    mask = torch.zeros(samples, frames - 1, 44, dtype=torch.bool)
    mask[..., 7:14] = True
    action = torch.randn(mask.shape, generator=g) * mask
    action[..., GRIPPERS] = (action[..., GRIPPERS] > 0).float()
    return {
        "video": torch.randint(0, 256, (samples, frames, 3, size, size), generator=g, dtype=torch.uint8),
        "instruction": [TASKS[i % 2] for i in range(samples)], "action": action, "action_mask": mask,
        "index": torch.arange(samples),
    }  # fmt: skip


def forward(model: lam.LAM, batch: dict, codec=None, seed: int = 0, counts: torch.Tensor | None = None, lambda_a=1.0):
    """One training forward pass, train()'s own: (loss, parts)."""
    counts = lam.valid_counts(batch["action_mask"]).clamp(min=1) if counts is None else counts
    return lam.micro_step(model, codec or CODEC, batch, counts, replace(ARGS, seed=seed, lambda_a=lambda_a))


def open_gates(model: lam.LAM) -> None:
    """Moves every parameter that starts at zero, as a few steps of training would."""
    for module in model.decoder.to_scene:
        torch.nn.init.normal_(module.gate, std=0.1)
    torch.nn.init.normal_(model.decoder.current.weight, std=0.02)
    torch.nn.init.normal_(model.decoder.sana.proj_out.weight, std=0.02)


# -- the same as the models it is built from ---------------------------------------------------------------------------


@pytest.mark.parametrize("uad", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_scene_stream_starts_as_sana(uad, checkpointing, tmp_path):
    sana = SanaTransformer2DModel(**lam.SANA_SIZES["sana-tiny"], caption_channels=128)
    sana.save_pretrained(tmp_path / "transformer")  # pretrained: at --tiny, the output is read in another way
    model = lam.build(replace(ARGS, decoder=str(tmp_path), uad=uad, checkpointing=checkpointing))
    x, current = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    s, z_sce, z_mot = torch.tensor([0.3, 0.95]), torch.randn(2, 4, 128), torch.randn(2, 6, 128)
    velocity, actions = model.decoder(x, current, s, z_sce, z_mot)
    sana = model.decoder.sana
    caption = model.decoder.to_caption(z_sce + model.decoder.places[0])
    expected = sana(x, encoder_hidden_states=caption, timestep=s * 1000).sample
    assert torch.equal(velocity, expected)
    assert (actions is None) != uad
    open_gates(model)
    assert not torch.equal(model.decoder(x, current, s, z_sce, z_mot)[0], expected)


def test_patched_decoder_equals_sana():
    """SANA's latents may be cut into patches: pixels must come out where diffusers puts them."""
    sana = SanaTransformer2DModel(**SMALL_SANA, patch_size=2)
    decoder = lam.Decoder(sana, replace(ARGS, decoder="pretrained"))
    x, s, z = torch.randn(2, 32, 4, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 6, 128)
    expected = sana(x, encoder_hidden_states=decoder.to_caption(z[:, :4] + decoder.places[0]), timestep=s * 1000).sample
    assert torch.equal(decoder(x, x, s, z[:, :4], z)[0], expected)


def right_padded(ids, kind, tokenizer):
    """The mask (B, L) of what is not padding, as Hugging Face wants it."""
    padding = (ids == tokenizer.pad_token_id) & (kind == 0)
    assert (padding.int().diff(dim=1) >= 0).all()  # on the right
    return (~padding).long()


def test_encoder_equals_hugging_face():
    vlm, tokenizer = common.load_vlm("internvl-tiny")
    vlm.eval()
    encoder = lam.Encoder(vlm, tokenizer, 4, 6, 128).eval()
    batch = make_batch()
    seen = []
    encoder.vlm.language_model.register_forward_hook(lambda m, i, out: seen.append(out.last_hidden_state))
    z_sce, z_mot = encoder(batch["video"], batch["instruction"])
    ours = seen[0]
    # Hugging Face's own path: everything by token ids, the queries as the embeddings of ten unused words.
    ids, kind = encoder.tokenize(batch["instruction"], 3)
    mask = right_padded(ids, kind, tokenizer)
    unused = [i for i in range(len(tokenizer)) if i not in set(ids.flatten().tolist())][:10]
    for row, at in zip(ids, kind, strict=True):
        row[at == 2] = torch.tensor(unused)
    with torch.no_grad():
        vlm.get_input_embeddings().weight[unused] = encoder.queries
    pixels = common.normalize_pixels(batch["video"].flatten(0, 1), "internvl", torch.float32)
    out = vlm(input_ids=ids, pixel_values=pixels, attention_mask=mask, output_hidden_states=True, use_cache=False)
    theirs = out.hidden_states[-1]
    valid = mask.bool()
    assert (ours - theirs)[valid].abs().max() < 1e-6
    z = torch.cat([z_sce, z_mot], 1)
    expected = encoder.head(theirs[kind == 2].view(2, 10, -1))
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    # Z has the unit scale that distillation counts on, and reads the frames, the instruction and each other in order.
    assert z.mean(-1).abs().max() < 1e-5 and (z.square().mean(-1) - 1).abs().max() < 1e-2
    assert not torch.allclose(encoder(batch["video"].flip(1), batch["instruction"])[0], z_sce, atol=1e-4)
    assert not torch.allclose(encoder(batch["video"], batch["instruction"][::-1])[0], z_sce, atol=1e-4)


def test_template_is_the_papers():
    """Word for word (Sec. 6.2), with one image per frame and the latent positions where the paper names them."""
    vlm, tokenizer = common.load_vlm("internvl-tiny")
    encoder = lam.Encoder(vlm, tokenizer, 4, 6, 128)
    ids, kind = encoder.tokenize(["close the oven"], 3)
    assert (kind == 1).sum() == 3 * encoder.config.image_seq_length and (kind == 2).sum() == 10
    assert (ids[kind == 1] == encoder.config.image_token_id).all()
    text = tokenizer.decode(ids[0][kind[0] == 0])
    assert text.startswith("<|im_start|>user\nFrame1: <img></img>\nFrame2: <img></img>\nFrame3: <img></img>\nGiven the")
    assert "Given the instruction “close the oven” and the video frames, reason about what happens within this time span. Explain how the overall scene changes" in text  # noqa: E501
    assert text.endswith("Answer: Scene evolution description: . Action dynamics description: .")
    order = "".join(map(str, kind[0].tolist())).replace("0", " ").split()
    assert order == ["1" * encoder.config.image_seq_length] * 3 + ["2" * 4, "2" * 6]
    # An instruction that spells a special token stays an instruction.
    assert (encoder.tokenize(["push <IMG_CONTEXT> {sent}"], 3)[1] == 1).sum() == (kind == 1).sum()
    with pytest.raises(InputError, match="lower --frames or shorten"):
        encoder.tokenize(["a"], 300)


def test_right_padding_changes_nothing():
    encoder = lam.build(ARGS).encoder.eval()
    batch = make_batch(4)
    together = torch.cat(encoder(batch["video"], batch["instruction"]), 1)
    for i in range(4):
        alone = torch.cat(encoder(batch["video"][i : i + 1], batch["instruction"][i : i + 1]), 1)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_flow_is_a_straight_line():
    x, index = torch.randn(64, 3, 4, 4), torch.arange(64)
    noisy, s, velocity = lam.flow(x, index, 5, 0.5)
    at = s[:, None, None, None]
    eps = common.noise((3, 4, 4), index, 5, x.device)
    torch.testing.assert_close(noisy, x + at * velocity)  # from the data ...
    torch.testing.assert_close(noisy + (1 - at) * velocity, eps)  # ... to the noise
    u = torch.sigmoid(common.noise((), index, 5, x.device, purpose=1))
    pure = s == 1  # where actions are read out
    torch.testing.assert_close(s[~pure], (3 * u / (1 + 2 * u))[~pure])
    assert abs(pure.float().mean() - 0.5) < 0.2 and not (lam.flow(x, index, 5, 0.0)[1] == 1).any()
    assert 0 < s.min() < 0.5 < s[~pure].mean() < s[~pure].max() < 1


def test_noise_belongs_to_samples():
    rows = common.noise((2, 3), torch.tensor([7, 3, 7]), 1, torch.device("cpu"))
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1:2], common.noise((2, 3), torch.tensor([3]), 1, torch.device("cpu")))
    for other in (dict(seed=2), dict(seed=1, purpose=1)):
        assert not torch.equal(rows[:1], common.noise((2, 3), torch.tensor([7]), device=torch.device("cpu"), **other))
    many = common.noise((1000,), torch.arange(50), 0, torch.device("cpu"))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_losses_in_closed_form():
    batch = make_batch()
    batch["action_mask"][1, 1] = False  # three of four steps are valid, each with six motion columns and one gripper
    counts = lam.valid_counts(batch["action_mask"])
    assert counts.tolist() == [18, 3]
    actions = batch["action"] + 0.5  # off by a half everywhere ...
    actions[..., GRIPPERS] = 0  # ... and undecided about the grippers
    actions[1, 1] = 1e3  # a masked step may say anything
    actions[..., 14:] = -1e3  # and so may masked columns
    velocity, target = torch.full((2, 3, 4, 4), 1.5), torch.full((2, 3, 4, 4), 1.0)
    loss, parts = lam.lam_loss(velocity, target, actions, batch, counts, 2.0)
    assert parts["frame"] == 0.25
    assert parts["motion"].item() == pytest.approx(0.25)
    assert parts["gripper"].item() == pytest.approx(math.log(2))
    assert loss.item() == pytest.approx(0.25 + 2.0 * (0.25 + math.log(2)))
    weighed, _ = lam.lam_loss(velocity, target, actions, batch, counts, 2.0, 0.1)
    assert weighed.item() == pytest.approx(0.25 + 2.0 * (0.25 + 0.1 * math.log(2)))
    # A share of a larger batch: divided by what the whole has.
    _, share = lam.lam_loss(velocity, target, actions, batch, 3 * counts, 2.0)
    assert share["motion"].item() == pytest.approx(0.25 / 3)
    assert share["gripper"].item() == pytest.approx(math.log(2) / 3)
    loss, parts = lam.lam_loss(velocity, target, None, batch, counts, 2.0)
    assert loss == 0.25 and list(parts) == ["frame"]


def test_nothing_valid_is_no_action_loss():
    model, batch = lam.build(ARGS), make_batch()
    batch["action_mask"][:] = False
    loss, parts = forward(model, batch)
    loss.backward()
    assert parts["motion"] == 0 and parts["gripper"] == 0 and torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def motion_gradient(model: lam.LAM, batch: dict, counts: torch.Tensor) -> torch.Tensor:
    """The gradient of L_action in the motion stream: what the whole loss's loses without it."""
    d, both = model.decoder, []
    own = [*d.motion.parameters(), d.queries, *d.noise_level.parameters(), *d.action_head.parameters()]
    for lambda_a in (1.0, 0.0):
        model.zero_grad()
        forward(model, batch, counts=counts, lambda_a=lambda_a)[0].backward()
        both.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in own]))
    assert both[1].abs().max() > 1e-6  # L_frame reaches it too, through the exchange
    return both[0] - both[1]


def test_action_free_samples_and_masked_columns_leave_the_motion_stream_alone():
    model, batch = lam.build(ARGS).eval(), make_batch(2)
    open_gates(model)
    batch["action_mask"][1] = False  # the second sample has no actions
    counts = lam.valid_counts(batch["action_mask"])
    gradient = motion_gradient(model, batch, counts)
    assert gradient.abs().max() > 1e-3
    first = {k: v[:1] for k, v in batch.items()}
    torch.testing.assert_close(gradient, motion_gradient(model, first, counts), rtol=1e-4, atol=1e-6)
    batch["action"] = torch.where(batch["action_mask"], batch["action"], 1e6)  # masked targets may hold anything
    assert torch.equal(gradient, motion_gradient(model, batch, counts))
    assert batch["action_mask"][0, 0, MOTION].sum() == 6


def test_options_out_of_range_are_named():
    shares, weights = (dict(pure_noise=1.5), dict(cut_exchange=-0.1)), (dict(lambda_a=-1), dict(lambda_g=-1))
    for wrong in (dict(frames=1), dict(hz=0), *shares, *weights):
        with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
            lam.check(replace(ARGS, **wrong))


def test_a_micro_step_asks_for_the_future_and_shows_the_present():
    """What reaches the model, and what it is compared with: V_t is the first frame, the target the last, the noise
    level and the cuts are the sample's, and L_frame at random sizes is the error of x."""
    batch, seen = make_batch(8, frames=3), {}

    def model(video, instructions, noisy, current, s, exchange):
        seen.update(noisy=noisy, current=current, s=s, exchange=exchange)
        assert video is batch["video"] and instructions is batch["instruction"]
        return torch.zeros_like(noisy), torch.zeros_like(batch["action"])

    counts = torch.tensor([20.0, 4.0])
    first, last = (CODEC.encode(batch["video"][:, i]) for i in (0, -1))
    for args in (replace(ARGS, lambda_a=0.3, seed=3), replace(ARGS, lambda_a=0.3, seed=3, decoder="a/pretrained")):
        loss, parts = lam.micro_step(model, CODEC, batch, counts, args)
        eps = common.noise(last.shape[1:], batch["index"], 3, last.device)
        at = seen["s"][:, None, None, None]
        assert torch.equal(seen["current"], first) and seen["s"].unique().numel() > 2 and (seen["s"] == 1).any()
        torch.testing.assert_close(seen["noisy"], (1 - at) * last + at * eps)
        assert torch.equal(seen["exchange"], lam.draw_exchange(batch["index"], 3, args.cut_exchange))
        weight = at if args.decoder == "sana-tiny" else 1
        torch.testing.assert_close(parts["frame"], ((eps - last) * weight).square().mean())
        torch.testing.assert_close(loss, parts["frame"] + 0.3 * (parts["motion"] + parts["gripper"]))


def test_augmentation_moves_a_whole_window():
    """All frames alike, sample by sample: what stands still goes on standing still, for the encoder and in what the
    decoder is shown and asked for."""
    batch, seen = make_batch(8, frames=3), {}
    batch["video"] = batch["video"][:, :1].expand(-1, 3, -1, -1, -1).clone()

    def model(video, instructions, noisy, current, s, exchange):
        seen.update(video=video, noisy=noisy, current=current, s=s)
        return torch.zeros_like(noisy), torch.zeros_like(batch["action"])

    lam.micro_step(model, CODEC, batch, torch.ones(2), replace(ARGS, augment=True, seed=3))
    video = seen["video"]
    assert video.shape == batch["video"].shape and video.dtype == torch.uint8
    assert torch.equal(video[:, 0], video[:, 1]) and torch.equal(video[:, 0], video[:, 2])
    assert all(not torch.equal(a, b) for a, b in zip(video, batch["video"], strict=True))
    assert torch.equal(seen["current"], CODEC.encode(video[:, 0]))
    at = seen["s"][:, None, None, None]
    eps = common.noise(seen["current"].shape[1:], batch["index"], 3, video.device)
    torch.testing.assert_close(seen["noisy"], (1 - at) * CODEC.encode(video[:, -1]) + at * eps)


# -- gradients and ablations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uad,dla", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("freeze", [True, False])
def test_gradients_reach_what_is_trained_and_nothing_else(uad, dla, freeze):
    model = lam.build(replace(ARGS, uad=uad, dla=dla, freeze_vision=freeze, checkpointing=True)).train()
    batch = make_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    reached: set[str] = set()
    for seed in range(3):  # what hides behind a gate gets a gradient once the gate has opened
        forward(model, batch, seed=seed)[0].backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    names = {n for n, _ in model.named_parameters()}
    frozen = {n for n in names if "vision_tower" in n} if freeze else set()
    assert names - reached == frozen


@pytest.mark.parametrize("uad", [True, False])
def test_undivided_latents_feed_both_streams(uad):
    model, batch = lam.build(replace(ARGS, dla=False, uad=uad)), make_batch()
    z_sce, z_mot = model.encode(batch["video"], batch["instruction"])
    assert z_sce is z_mot and z_sce.shape == (2, 10, 128)
    apart = lam.build(replace(ARGS, uad=uad)).encode(batch["video"], batch["instruction"])
    assert [z.shape[1] for z in apart] == [4, 6]


def test_ablations_change_what_they_say():
    """Without UAD: no actions, and Z_mot still reaches the frame. All four have the same parameters to 2 %."""
    sizes = {}
    for uad in (True, False):
        for dla in (True, False):
            model, batch = lam.build(replace(ARGS, uad=uad, dla=dla)).eval(), make_batch()
            sizes[uad, dla] = lam.count(model)
            loss, parts = forward(model, batch)
            assert set(parts) == ({"frame", "motion", "gripper"} if uad else {"frame"})
            open_gates(model)
            x, s = torch.randn(2, *SHAPE), torch.tensor([1.0, 0.5])
            z_sce, z_mot = model.encode(batch["video"], batch["instruction"])
            frame = model.decode(x, x, s, (z_sce, z_mot))[0]
            for changed in ((z_sce * 0, z_mot), (z_sce, z_mot * 0)):
                assert not torch.allclose(model.decode(x, x, s, changed)[0], frame, atol=1e-6)
    assert len(set(sizes.values())) > 1 and max(sizes.values()) < 1.02 * min(sizes.values())


def test_a_cut_exchange_leaves_each_stream_to_its_own_tokens():
    """Scene to motion cut: Z_sce moves no action; motion to scene cut: Z_mot moves no pixel. Open, both do. Which are
    cut belongs to the sample, and is about half of them."""
    model, batch = lam.build(ARGS).eval(), make_batch()
    open_gates(model)
    x, s = torch.randn(2, *SHAPE), torch.ones(2)
    with torch.no_grad():
        z_sce, z_mot = model.encode(batch["video"], batch["instruction"])
        for cut in (True, False):
            to_motion, to_scene = (torch.tensor([row] * 2).float() for row in ([not cut, True], [True, not cut]))
            actions = [model.decode(x, x, s, (z, z_mot), to_motion)[1] for z in (z_sce, z_sce + 1)]
            frames = [model.decode(x, x, s, (z_sce, z), to_scene)[0] for z in (z_mot, z_mot + 1)]
            assert torch.equal(*actions) == cut and torch.equal(*frames) == cut
        one_each = model.decode(x, x, s, (z_sce, z_mot), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        alone = [model.decode(x, x, s, (z_sce, z_mot), torch.tensor([row] * 2)) for row in ([0.0, 1.0], [1.0, 0.0])]
        for i in range(2):
            for got, expected in zip(one_each, alone[i], strict=True):
                torch.testing.assert_close(got[i], expected[i])
    index = torch.arange(2000)
    drawn = lam.draw_exchange(index, 0, 0.25)
    assert torch.equal(drawn[7:9], lam.draw_exchange(index[7:9], 0, 0.25))
    assert not torch.equal(drawn, lam.draw_exchange(index, 1, 0.25)) and lam.draw_exchange(index, 0, 0).all()
    assert (drawn.mean(0) - 0.75).abs().max() < 0.05 and abs(drawn.prod(1).mean() - 0.75**2) < 0.05


# -- sampling, codec, learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder,size", [("sana-tiny", 64), ("sana-small", 96)])
def test_pixel_codec_is_an_exact_inverse(decoder, size):
    codec = lam.load_codec(decoder, lam.SANA_SIZES[decoder]["in_channels"], CPU)
    images = torch.arange(2 * 3 * size * size).remainder(256).to(torch.uint8).view(2, 3, size, size)
    latents = codec.encode(images)
    channels = lam.SANA_SIZES[decoder]["in_channels"]
    assert latents.shape == (2, channels, size // codec.factor, size // codec.factor)
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(codec.decode(latents), images)
    assert codec.decode(latents * 3).max() == 255 and codec.decode(latents * 3).min() == 0  # clipped, not wrapped


def test_sampling_is_finite_and_belongs_to_samples():
    model, batch, codec = lam.build(ARGS).eval(), make_batch(), CODEC
    open_gates(model)
    current = codec.encode(batch["video"][:, 0])
    with torch.no_grad():
        z = model.encode(batch["video"], batch["instruction"])
    frame = lam.sample_frame(model, current, z, batch["index"], 0, steps=4)
    assert frame.shape == current.shape and torch.isfinite(frame).all() and not frame.requires_grad
    second = lam.sample_frame(model, current[1:], (z[0][1:], z[1][1:]), batch["index"][1:], 0, steps=4)
    torch.testing.assert_close(frame[1:], second, rtol=1e-4, atol=1e-4)
    actions = lam.decode_actions(model, current, z, batch["index"], 0)
    assert actions.shape == (2, 2, 44) and torch.isfinite(actions).all()
    assert ((actions[..., GRIPPERS] > 0) & (actions[..., GRIPPERS] < 1)).all()


def test_sampling_solves_the_flow_exactly():
    """A model that knows the data predicts (x_s - x) / s: the Euler steps must then end at x."""
    x = torch.rand(2, 3, 4, 4) * 2 - 1

    class Oracle:
        def decode(self, noisy, current, s, z):
            return (noisy - x) / s[:, None, None, None], None

    for steps in (1, 7, 20):
        got = lam.sample_frame(Oracle(), torch.zeros(2, 3, 4, 4), (x, x), torch.arange(2), 0, steps=steps)
        torch.testing.assert_close(got, x, rtol=0, atol=2e-3)


def four_futures() -> dict:
    """Four clips that start with the same frame and the same words: only what follows tells them apart, a move in one
    of four directions and a change of the light."""
    batch = make_batch(4, frames=3)
    batch["instruction"] = [TASKS[0]] * 4
    batch["video"][:] = 90
    lights = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 200]], dtype=torch.uint8)
    batch["video"][:, 1:] = lights[:, None, :, None, None]
    for i, (dx, dy) in enumerate(((12, 0), (-12, 0), (0, 12), (0, -12))):
        for t in range(3):
            x, y = 32 + dx * t, 32 + dy * t
            batch["video"][i, t, :, max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 255
        batch["action"][i, :, 7:9] = torch.tensor([dx, dy]) / 12
        batch["action"][i, :, 9:13] = 0
        batch["action"][i, :, 13] = i % 2
    return batch


def overfit(steps: int, broken: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains on the four futures at s = 1 with the noise zero: what tells them apart can only come through Z.
    Returns (frame, motion, gripper) losses before and after. `broken` zeroes Z."""
    torch.manual_seed(0)
    model = lam.build(replace(ARGS, scene_tokens=4, motion_tokens=4)).train()
    batch, codec = four_futures(), CODEC
    if broken:
        encode = model.encode
        model.encode = lambda *a: tuple(z * 0 for z in encode(*a))
    current, future = codec.encode(batch["video"][:, 0]), codec.encode(batch["video"][:, -1])
    eps = torch.zeros_like(future)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, steps, 2e-3, 1e-5, 10)
        velocity, actions = model(batch["video"], batch["instruction"], eps, current, torch.ones(4))
        counts = lam.valid_counts(batch["action_mask"])
        loss, parts = lam.lam_loss(velocity, eps - future, actions, batch, counts, 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack([parts["frame"], parts["motion"], parts["gripper"]]))
    return history[0], history[-1]


def test_overfits_four_futures_through_z_alone():
    batch = four_futures()
    future = CODEC.encode(batch["video"][:, -1])
    motion = batch["action"][..., 7:13]
    blind = torch.stack([  # the least that a model can reach that does not see Z
        (future - future.mean(0)).square().mean(), (motion - motion.mean(0)).square().mean(), torch.tensor(math.log(2)),
    ])  # fmt: skip
    start, end = overfit(OVERFIT_STEPS, broken=False)
    assert (end < 0.2 * start).all() and (end < 0.4 * blind).all(), (start, end, blind)
    start, end = overfit(OVERFIT_STEPS // 3, broken=True)
    assert (end > 0.9 * blind).all(), (start, end, blind)


OVERFIT_STEPS = 60


# -- pretrained weights ------------------------------------------------------------------------------------------------

SMALL_SANA = dict(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, num_cross_attention_heads=2, caption_channels=24,
    cross_attention_head_dim=16, cross_attention_dim=32, sample_size=2,
)  # fmt: skip
SMALL_DC = dict(
    attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock", scaling_factor=0.41407,
    encoder_block_out_channels=(32,) * 6, decoder_block_out_channels=(32,) * 6, encoder_layers_per_block=(1,) * 6,
    decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders in the published layouts, written by the real classes: InternVL, and SANA with its autoencoder."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    for name in ("internvl", "paligemma"):
        vlm, tokenizer = common.load_vlm(f"{name}-tiny")
        vlm.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    SanaTransformer2DModel(**SMALL_SANA).save_pretrained(root / "sana/transformer", max_shard_size="100KB")
    AutoencoderDC(**SMALL_DC).save_pretrained(root / "sana/vae")
    return root


def pretrained(root, **changes) -> lam.Args:
    args = replace(ARGS, encoder=str(root / "internvl"), decoder=str(root / "sana"), freeze_vision=True)
    return replace(args, **changes)


def test_pretrained_folders(published):
    args = pretrained(published)
    model = lam.build(args)
    codec = lam.load_codec(args.decoder, model.decoder.config.in_channels, CPU)
    assert len(list((published / "sana/transformer").glob("*.safetensors"))) > 1  # sharded, as the large ones are
    sana = SanaTransformer2DModel.from_pretrained(published / "sana", subfolder="transformer", low_cpu_mem_usage=False)
    assert all(torch.equal(v, model.decoder.sana.state_dict()[k]) for k, v in sana.state_dict().items())
    stored = load_file(published / "internvl/model.safetensors")
    name = next(k for k in stored if k.endswith("layers.0.mlp.up_proj.weight") and "language" in k)
    assert torch.equal(stored[name], model.encoder.vlm.language_model.layers[0].mlp.up_proj.weight)
    batch = make_batch()
    latents = codec.encode(batch["video"][:, 0])
    assert latents.shape == (2, 32, 2, 2) and latents.dtype == torch.float32
    vae = AutoencoderDC.from_pretrained(published / "sana", subfolder="vae", low_cpu_mem_usage=False)
    expected = vae.encode(batch["video"][:, 0].float() / 127.5 - 1).latent * 0.41407
    torch.testing.assert_close(latents, expected)
    images = codec.decode(latents)
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8
    loss, _ = forward(model, batch, codec)
    loss.backward()
    assert torch.isfinite(loss) and model.encoder.vlm.language_model.embed_tokens.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.encoder.vlm.vision_tower.parameters())
    assert not any(p.requires_grad for p in codec.vae.parameters())


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(encoder="paligemma"), "is InternVL"),
        (dict(encoder="nothing"), "no vision-language model"),
        (dict(decoder="nothing"), "no SanaTransformer2DModel"),
        (dict(decoder="internvl"), "no SanaTransformer2DModel"),
        (dict(image_size=96), "--image-size 96.*64 pixels"),
        (dict(motion_heads=3), "--motion-heads"),
    ],
)
def test_what_does_not_fit_is_named(published, changes, message):
    changes = {k: str(published / v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(InputError, match=message):
        lam.build(pretrained(published, **changes))


def test_partial_weights_are_an_error(published, tmp_path):
    """diffusers itself only warns: a run would start from half a model."""
    whole = SanaTransformer2DModel(**SMALL_SANA)
    spoil = {
        "1 tensors missing .*proj_out.weight": lambda d: d.pop("proj_out.weight"),
        "1 left over .*foo": lambda d: d.update(foo=torch.zeros(1)),
        "1 of another shape .*proj_out.bias": lambda d: d.update({"proj_out.bias": torch.zeros(3)}),
    }
    for message, change in spoil.items():
        whole.save_pretrained(tmp_path / "transformer")
        path = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(InputError, match=message):
            lam.build(pretrained(published, decoder=str(tmp_path)))
    AutoencoderDC(**SMALL_DC).save_pretrained(tmp_path / "transformer")  # a right folder with the wrong model in it
    with pytest.raises(InputError, match="it is a AutoencoderDC"):
        lam.build(pretrained(published, decoder=str(tmp_path)))
    with pytest.raises(InputError, match="no AutoencoderDC"):
        lam.load_codec(str(tmp_path), 32, CPU)


def test_full_size_is_the_published_architecture():
    """On the meta device: SANA as diffusers defines it has 1.6 billion parameters, ours adds to it."""
    with torch.device("meta"):
        decoder = lam.Decoder(SanaTransformer2DModel(), lam.Args())
    assert sum(p.numel() for p in decoder.sana.parameters()) == pytest.approx(1.60e9, rel=0.01)
    queries = decoder.queries.shape
    assert queries == (15, 1024) and decoder.current.weight.shape == (2240, 32, 1, 1)
