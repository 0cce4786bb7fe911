"""Stage 1: the latent action model (LatBot, arXiv 2511.23034, Sec. 3.1, 3.2, 6.2, 6.3).

A vision-language model looks at T frames and an instruction and sums up what happens in two sets of latent action
tokens: scene tokens Z_sce (passive changes) and motion tokens Z_mot (the robot's own movement), Eq. 1. A unified
decoder has to rebuild from them both the last frame, V_{t+k}, and the actions in between, A_{t:t+k}.

    frames V_{t:t+k} (B,T,3,H,W), instruction --InternVL--> Z_sce (B,Ns,D), Z_mot (B,Nm,D)

    V_t latents + noisy V_{t+k} latents --> scene stream  (SANA blocks, cross-attention to Z_sce)  --> velocity
                                               ^ |    at every layer: motion tokens -> scene (zero-gated),
                                               | v                    scene tokens  -> motion
    T-1 action queries                  --> motion stream (transformer, cross-attention to Z_mot)  --> A (B,T-1,44)

    python lam.py --tiny                                     a CPU, about a minute, on the data that ships
    python franka.py --small --record 100 --task all --out runs/data/five_tasks && python lam.py --small    laptop, GPU
    torchrun --nproc-per-node 16 lam.py --data A B C         the paper's run (two nodes: --nnodes 2 --nproc-per-node 8)

Reads LeRobot data sets (--data). Writes runs/<preset>/lam/: args.json, metrics.jsonl, checkpoints/step_*/ with the
encoder and the decoder (the frozen image codec is not copied). `distill.py` reads the encoder from there.

Where we depart from the paper, or fill in what it does not say:
 1. Z is the VLM's last hidden state at the [CP_SCE] and [CP_MOT] positions, passed through norm, linear, norm: the
    distillation target (Eq. 4) then has unit scale. The paper gives no head.
 2. [CP_SCE] and [CP_MOT] stand for 64 positions each, with 64 learned embeddings each.
 3. The future frame is learned by rectified flow, as SANA was trained: x_s = (1-s) x + s noise, velocity = noise - x,
    s logit-normal with shift 3, and s = 1 for a quarter of the samples. V_t enters through zero-initialised input
    channels, beside SANA's own.
 4. The exchange is one cross-attention in each direction after every SANA block. The one into the scene stream is
    multiplied by a gate that starts at zero, so that at initialisation the scene stream is SANA to the last bit. The
    motion stream knows the noise level s; actions are read out at s = 1, where the scene stream sees only noise, so
    what it knows about the future can only come from Z. Without UAD there are no motion tokens, and the gated
    cross-attention reads Z_mot itself.
 5. L = L_frame + lambda_a L_action with lambda_a = 1. L_action: squared error over moving dimensions, and binary
    cross-entropy over grippers, each averaged over all valid entries of the global batch. Samples without actions add
    L_frame alone.
 6. 10 Hz, 448 px for encoder and decoder, and the number of steps are ours; the paper gives days of 16 A100s.
 7. At --tiny and --small nothing is pretrained: the vision encoder is trained too (a frozen random one sees nothing),
    and an invertible pixel-unshuffle stands in for the DC-AE autoencoder.
 8. Weight decay 0.01 and gradient clipping at 1 are ours.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
from common import GRIPPERS, MOTION, InputError, Process, View, Windows
from data import mixture

# Shapes: B batch, T frames, A = T-1 action steps, L text positions, N latent tokens (Ns scene, Nm motion), D their
# width, C x h x w image latents, S the scene stream's width, W the motion stream's.

SANA_SIZES: dict[str, dict[str, Any]] = {  # decoders from random weights (our choice)
    # Patches of 4 x 4 and 6 x 6 pixels: a velocity contains the noise, so a token must be wider than its patch. SANA
    # tells places apart by its convolutions alone; with two to four layers, sine and cosine embeddings help it.
    "sana-tiny": dict(
        num_layers=2, num_attention_heads=4, attention_head_dim=32, num_cross_attention_heads=4,
        cross_attention_head_dim=32, cross_attention_dim=128, in_channels=48, out_channels=48, sample_size=16,
        interpolation_scale=1,
    ),
    "sana-small": dict(
        num_layers=4, num_attention_heads=8, attention_head_dim=32, num_cross_attention_heads=4,
        cross_attention_head_dim=64, cross_attention_dim=256, in_channels=108, out_channels=108, sample_size=16,
        interpolation_scale=1,
    ),
}  # fmt: skip
FLOW_SHIFT = 3.0  # SANA's own: more training on high noise
PURE_NOISE = 0.25  # share of samples at s = 1, where actions are read out (our choice)


@dataclass
class Args:
    data: tuple[str, ...] = ("datasets/pretrain",)
    """LeRobot data sets: PATH, PATH@MAPPING for columns named otherwise (see data/mappings), or a folder with those of
    Table 6 (see data/mixture.py)."""
    weights: tuple[float, ...] = ()
    """Sampling weight of each --data; none: every frame counts alike, but a folder's data sets as in Table 6."""
    out: str = "runs/paper/lam"
    """Run folder: log and checkpoints."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, bit for bit."""
    encoder: str = "OpenGVLab/InternVL3_5-2B-HF"
    """InternVL: folder or hub name, or internvl-tiny / internvl-small from random weights. (Sec. 6.2)"""
    decoder: str = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
    """SANA with its autoencoder: folder or hub name, or sana-tiny / sana-small from random weights. (Sec. 6.2)"""
    freeze_vision: bool = True
    """Keep the VLM's vision encoder frozen. (Sec. 6.3)"""
    frames: int = 16
    """T, frames in a window. (Sec. 4.1)"""
    hz: float = 10.0
    """Frames per second of a window; faster data are strided. (our choice)"""
    image_size: int = 448
    """Pixels, square, of the encoder's and the decoder's images. (InternVL's own)"""
    camera: str = "primary"
    """The camera whose frames are used. (our choice)"""
    scene_tokens: int = 64
    """Ns, scene tokens. (Sec. 4.1)"""
    motion_tokens: int = 64
    """Nm, motion tokens. (Sec. 4.1)"""
    latent_dim: int = 2048
    """D, width of a latent action token. (our choice: the student's width)"""
    motion_width: int = 1024
    """W, width of the motion stream. (our choice)"""
    motion_heads: int = 16
    """Attention heads of the motion stream and of the exchange. (our choice)"""
    uad: bool = True
    """Unified action decoder: off, no motion stream and no action loss. (Table 5)"""
    dla: bool = True
    """Decoupled latent actions: off, one undivided set of Ns + Nm tokens feeds both streams. (Table 5)"""
    lambda_a: float = 1.0
    """Weight of L_action. (our choice)"""
    batch: int = 16
    """Windows per GPU and micro-step. (Sec. 6.3)"""
    accumulate: int = 2
    """Micro-steps per optimizer step: 16 x 2 x 16 GPUs = 512. (Sec. 6.3)"""
    steps: int = 65_000
    """Optimizer steps. (our choice: about 14 days of 16 A100s)"""
    lr: float = 1e-4
    """Peak learning rate. (Sec. 6.3)"""
    min_lr: float = 2.5e-6
    """Learning rate at the last step of the cosine. (Sec. 6.3)"""
    warmup: int = 2000
    """Warm-up steps. (Sec. 6.3)"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas. (Sec. 6.3)"""
    weight_decay: float = 0.01
    """AdamW's weight decay. (our choice)"""
    clip: float = 1.0
    """Largest norm of the gradient. (our choice)"""
    checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more arithmetic. (our choice)"""
    val_every: int = 20
    """One episode in so many is held out for validation; 0 for none: then it is measured on all. (our choice)"""
    val_samples: int = 64
    """Held-out windows measured at each save. (our choice)"""
    save_every: int = 1000
    """Steps between checkpoints, each with a validation. (our choice)"""
    log_every: int = 20
    """Steps between lines of the log. (our choice)"""
    workers: int = 8
    """Decoding processes per GPU. (our choice)"""
    preload: bool = False
    """Decode all frames into memory at the start: for data that fit. (our choice)"""
    seed: int = 0
    """Seed of the initialisation, the data stream and the noise."""


TINY = Args(
    data=("data/tiny",), out="runs/tiny/lam", encoder="internvl-tiny", decoder="sana-tiny", freeze_vision=False,
    frames=4, image_size=64, scene_tokens=8, motion_tokens=8, latent_dim=128, motion_width=128, motion_heads=4,
    batch=8, accumulate=1, steps=300, lr=5e-4, min_lr=1e-5, warmup=10, checkpointing=False, val_every=15,
    val_samples=64, save_every=100, log_every=10, workers=0, preload=True,
)  # fmt: skip
SMALL = Args(
    data=("runs/data/five_tasks",), out="runs/small/lam", encoder="internvl-small", decoder="sana-small",
    freeze_vision=False, frames=8, image_size=96, scene_tokens=16, motion_tokens=16, latent_dim=256, motion_width=256,
    motion_heads=8, batch=8, accumulate=1, steps=1800, lr=5e-4, min_lr=1e-5, warmup=100, checkpointing=False,
    val_every=10, val_samples=128, save_every=200, log_every=20, workers=0, preload=True,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Model: the encoder (Sec. 3.1)
# --------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """InternVL that reads frames and an instruction through the paper's template (Sec. 6.2) and answers with latents.

        <|im_start|>user  Frame1: <img> n positions </img> ... FrameT: ...  question with the instruction <|im_end|>
        <|im_start|>assistant  Answer: Scene evolution description: [Ns positions]. Action dynamics ...: [Nm positions].

    The language model is causal, so Z_mot can read Z_sce and both can read everything before them."""

    def __init__(self, vlm: nn.Module, tokenizer: Any, scene_tokens: int, motion_tokens: int, latent_dim: int):
        super().__init__()
        if vlm.config.model_type != "internvl":
            raise InputError(f"the latent action encoder is InternVL, not {vlm.config.model_type!r}: change --encoder")
        self.vlm = vlm.model  # without the language head: nothing here writes text
        self.config, self.tokenizer = vlm.config, tokenizer
        width = vlm.config.text_config.hidden_size
        self.counts = (scene_tokens, motion_tokens)
        self.queries = nn.Parameter(torch.randn(scene_tokens + motion_tokens, width) * 0.02)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, latent_dim), nn.LayerNorm(latent_dim, elementwise_affine=False)
        )

    def tokenize(self, instructions: list[str], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, their kind (0 text, 1 image, 2 latent), and the mask of what is not padding: each (B, L).

        Raises InputError when that is longer than the VLM's context."""
        text = lambda s: [(i, 0) for i in self.tokenizer(s, add_special_tokens=False).input_ids]
        pad = self.tokenizer.pad_token_id
        image = [(self.config.image_token_id, 1)] * self.config.image_seq_length
        scene, motion = ([(pad, 2)] * n for n in self.counts)
        head = text("<|im_start|>user\n")
        for f in range(frames):
            head += text(f"Frame{f + 1}: <img>") + image + text("</img>\n")
        before, between, after = common.LAM_ANSWER.replace("[CP_SCE]", "[CP_MOT]").split("[CP_MOT]")
        answer = text(before) + scene + text(between) + motion + text(after)
        question = common.LAM_QUESTION + "<|im_end|>\n<|im_start|>assistant\n"
        rows = [head + text(question.format(sent=sent)) + answer for sent in instructions]
        length, limit = max(map(len, rows)), self.config.text_config.max_position_embeddings
        if length > limit:
            raise InputError(f"{frames} frames and an instruction of {max(map(len, instructions))} letters make "
                             f"{length} tokens, the VLM takes {limit}: lower --frames or shorten the instruction")
        ids, kind = torch.tensor([row + [(pad, 0)] * (length - len(row)) for row in rows]).unbind(-1)
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return ids, kind, mask.long()

    def forward(self, video: Tensor, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """video uint8 (B, T, 3, H, H) -> Z_sce (B, Ns, D), Z_mot (B, Nm, D).  (Eq. 1)"""
        ids, kind, mask = (x.to(video.device) for x in self.tokenize(instructions, video.shape[1]))
        embeds = self.vlm.get_input_embeddings()(ids)  # (B, L, width)
        pixels = common.normalize_pixels(rearrange(video, "b t c h w -> (b t) c h w"), "internvl", embeds.dtype)
        images = self.vlm.get_image_features(pixel_values=pixels).pooler_output  # (B T, n, width)
        latents = repeat(self.queries, "n d -> b n d", b=len(video))
        embeds = embeds.masked_scatter((kind == 1)[..., None], images.to(embeds.dtype))
        embeds = embeds.masked_scatter((kind == 2)[..., None], latents.to(embeds.dtype))
        hidden = self.vlm.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        z = self.head(rearrange(hidden[kind == 2], "(b n) d -> b n d", b=len(video)))  # (B, Ns+Nm, D)
        return z[:, : self.counts[0]], z[:, self.counts[0] :]


# --------------------------------------------------------------------------------------------------------------------
# Model: the unified decoder (Sec. 3.2)
# --------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention of x (B, N, dim) to context (B, M, context_dim)."""

    def __init__(self, dim: int, context_dim: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, width)
        self.kv = nn.Linear(context_dim, 2 * width)
        self.out = nn.Linear(width, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(context), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class MotionLayer(nn.Module):
    """One layer of the motion stream: itself, Z_mot, the scene stream's tokens of the same layer, and an MLP."""

    def __init__(self, width: int, heads: int, latent_dim: int, scene_width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.scene_norm = nn.LayerNorm(scene_width)
        self.itself = Attention(width, width, width, heads)
        self.latent = Attention(width, latent_dim, width, heads)
        self.scene = Attention(width, scene_width, width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, z_mot: Tensor, scene: Tensor) -> Tensor:
        x = x + self.itself(h := self.norms[0](x), h)
        x = x + self.latent(self.norms[1](x), z_mot)
        x = x + self.scene(self.norms[2](x), self.scene_norm(scene))
        return x + self.mlp(self.norms[3](x))


class MotionToScene(nn.Module):
    """The exchange's other direction: scene tokens (B, hw, S) read the motion (B, N, context), through a gate that
    starts closed."""

    def __init__(self, scene_width: int, context: int, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(scene_width)
        self.attention = Attention(scene_width, context, width, heads)
        self.gate = nn.Parameter(torch.zeros(scene_width))

    def forward(self, scene: Tensor, motion: Tensor) -> Tensor:
        return scene + self.gate * self.attention(self.norm(scene), motion)


class Decoder(nn.Module):
    """The unified decoder: SANA's blocks and a motion stream that exchange information after every layer."""

    def __init__(self, sana: SanaTransformer2DModel, args: Args):
        super().__init__()
        self.sana, self.config = sana, sana.config
        width = sana.config.num_attention_heads * sana.config.attention_head_dim
        self.current = nn.Conv2d(sana.config.in_channels, width, sana.config.patch_size, sana.config.patch_size)
        nn.init.zeros_(self.current.weight)  # V_t's input channels: zero, so that nothing changes at the start
        nn.init.zeros_(self.current.bias)
        self.to_caption = nn.Linear(args.latent_dim, sana.config.caption_channels)
        self.checkpointing, self.uad = args.checkpointing, args.uad
        w, heads, layers = args.motion_width, args.motion_heads, range(sana.config.num_layers)
        # Without a motion stream the scene stream reads Z_mot itself: else nothing would train it.
        read = w if args.uad else args.latent_dim
        self.to_scene = nn.ModuleList(MotionToScene(width, read, w, heads) for _ in layers)
        self.motion = nn.ModuleList(MotionLayer(w, heads, args.latent_dim, width) for _ in layers if args.uad)
        if args.uad:
            self.queries = nn.Parameter(torch.randn(args.frames - 1, w) * 0.02)
            self.noise_level = nn.Linear(width, w)
            self.action_head = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, len(common.ACTION_NAMES)))

    def layer(self, v: int, scene: Tensor, motion: Tensor | None, caption: Tensor, z_mot: Tensor, t: Tensor, hw: tuple):
        """Layer v of both streams: (scene (B, hw, S), motion (B, A, W) or None) -> the same."""
        scene = self.sana.transformer_blocks[v](
            scene, encoder_hidden_states=caption, timestep=t, height=hw[0], width=hw[1]
        )
        if motion is not None:
            motion = self.motion[v](motion, z_mot, scene)
        return self.to_scene[v](scene, z_mot if motion is None else motion), motion

    def forward(self, noisy: Tensor, current: Tensor, s: Tensor, z_sce: Tensor, z_mot: Tensor):
        """noisy and current (B, C, h, w): latents of V_{t+k} at noise level s (B,) in [0, 1], and of V_t.

        Returns the velocity (B, C, h, w) and the actions (B, A, 44), normalised, gripper columns as logits; None
        without the unified action decoder."""
        p = self.config.patch_size
        hw = (noisy.shape[2] // p, noisy.shape[3] // p)
        scene = self.sana.patch_embed(noisy) + rearrange(self.current(current), "b s h w -> b (h w) s")
        t, embedded = self.sana.time_embed(s * 1000, batch_size=len(noisy), hidden_dtype=scene.dtype)
        caption = self.sana.caption_norm(self.sana.caption_projection(self.to_caption(z_sce)))
        motion = None
        if self.uad:
            motion = repeat(self.queries, "a w -> b a w", b=len(noisy)) + self.noise_level(F.silu(embedded))[:, None]
        for v in range(self.config.num_layers):
            if self.checkpointing and torch.is_grad_enabled():
                scene, motion = checkpoint(self.layer, v, scene, motion, caption, z_mot, t, hw, use_reentrant=False)
            else:
                scene, motion = self.layer(v, scene, motion, caption, z_mot, t, hw)
        out = self.sana.proj_out(self.sana.norm_out(scene, embedded, self.sana.scale_shift_table))
        out = rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=hw[0], p=p, q=p).contiguous()
        return out, self.action_head(motion) if self.uad else None


class LAM(nn.Module):
    """The latent action model: `model(video, instructions, noisy, current, s)` for training; `encode` and `decode` are
    its halves (of an unsharded model)."""

    def __init__(self, encoder: Encoder, decoder: Decoder, dla: bool):
        super().__init__()
        self.encoder, self.decoder, self.dla = encoder, decoder, dla

    def encode(self, video: Tensor, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """(Z_sce, Z_mot) as the decoder takes them. Without DLA both are the same, undivided set."""
        z_sce, z_mot = self.encoder(video, instructions)
        if not self.dla:
            z_sce = z_mot = torch.cat([z_sce, z_mot], 1)
        return z_sce, z_mot

    def decode(self, noisy: Tensor, current: Tensor, s: Tensor, z: tuple[Tensor, Tensor]):
        return self.decoder(noisy, current, s, *z)

    def forward(self, video: Tensor, instructions: list[str], noisy: Tensor, current: Tensor, s: Tensor):
        return self.decode(noisy, current, s, self.encode(video, instructions))


class PixelCodec:
    """An exactly invertible stand-in for the image autoencoder: f x f pixels become 3 f^2 channels in [-1, 1]."""

    def __init__(self, factor: int = 4):
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, 3 f^2, H/f, W/f)."""
        return F.pixel_unshuffle(images.float() / 127.5 - 1, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse: float latents -> uint8 images, clipped."""
        return ((F.pixel_shuffle(latents.float(), self.factor) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class DeepCodec:
    """SANA's own deep-compression autoencoder, frozen: 32 x 32 pixels become 32 channels."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype):
        self.vae = load_part(AutoencoderDC, source, "vae", dtype).to(device).eval().requires_grad_(False)
        self.dtype, self.scale = dtype, self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, 32, H/32, W/32), at the scale that SANA was trained on."""
        return self.vae.encode((images.float() / 127.5 - 1).to(self.dtype)).latent.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The way back, not exact: float latents -> uint8 images, clipped."""
        images = self.vae.decode((latents / self.scale).to(self.dtype)).sample
        return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_part(kind: type, source: str, subfolder: str, dtype: torch.dtype) -> nn.Module:
    """A pretrained part of a diffusers pipeline. Raises InputError where it is absent, of another class or partial."""
    try:
        there = kind.load_config(source, subfolder=subfolder).get("_class_name")
        if there != kind.__name__:
            raise ValueError(f"it is a {there}")
        options = {"torch_dtype": dtype, "low_cpu_mem_usage": False, "output_loading_info": True}
        model, report = kind.from_pretrained(source, subfolder=subfolder, **options)
        if partial := {k: sorted(v)[:3] for k, v in report.items() if v}:
            raise ValueError(f"its weights do not fit its config.json: {partial}")
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"no {kind.__name__} in {source}/{subfolder} ({why}): give --decoder a local folder, a "
                         f"reachable hub name, or one of {sorted(SANA_SIZES)}") from None  # fmt: skip
    return model


def load_codec(decoder: str, channels: int, process: Process) -> PixelCodec | DeepCodec:
    """The image codec that belongs to a decoder with so many input channels. Raises InputError where the weights
    cannot be found."""
    if decoder in SANA_SIZES:
        return PixelCodec(math.isqrt(channels // 3))
    return DeepCodec(decoder, process.device, process.dtype)


def build(args: Args, checkpoint: Path | None = None) -> LAM:
    """The model: from pretrained or random weights, or with the architecture of a checkpoint, to be filled.

    Raises InputError for sizes that do not fit each other and for weights that are absent or of another family."""
    if args.frames < 2 or args.motion_width % args.motion_heads:
        raise InputError(f"--frames must be at least 2 ({args.frames}), and --motion-width ({args.motion_width}) a "
                         f"multiple of --motion-heads ({args.motion_heads})")  # fmt: skip
    meta = common.load_meta(checkpoint) if checkpoint else {}
    vlm, tokenizer = common.load_vlm(args.encoder, meta.get("encoder_config"), checkpoint)
    if checkpoint:
        sana = SanaTransformer2DModel.from_config(meta["decoder_config"])
    elif args.decoder in SANA_SIZES:
        sana = SanaTransformer2DModel(**SANA_SIZES[args.decoder], caption_channels=args.latent_dim)
    else:
        sana = load_part(SanaTransformer2DModel, args.decoder, "transformer", torch.float32)
    encoder = Encoder(vlm, tokenizer, args.scene_tokens, args.motion_tokens, args.latent_dim)
    side = encoder.config.vision_config.image_size[0]
    if args.image_size != side:
        raise InputError(f"--image-size {args.image_size}, but {args.encoder} takes {side} pixels")
    encoder.vlm.vision_tower.requires_grad_(not args.freeze_vision)
    if args.checkpointing:
        encoder.vlm.activation_checkpointing_enable()
    return LAM(encoder, Decoder(sana, args), args.dla)


def load_lam(path: str | Path) -> tuple[LAM, Args, dict[str, Any]]:
    """A trained latent action model, its arguments and its checkpoint's metadata.

    Raises InputError when the path holds no checkpoint of this stage, or one that does not fit."""
    found = common.find_checkpoint(path, "lam")
    meta = common.load_meta(found)
    args = common.load_args(Args, meta)
    model = build(args, found)
    common.load_weights(model, found)
    return model, args, meta


# --------------------------------------------------------------------------------------------------------------------
# Loss (Sec. 3.2)
# --------------------------------------------------------------------------------------------------------------------


def flow(x: Tensor, index: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A point on the straight line from data x (B, C, h, w) to noise: (x_s, s (B,), velocity), x_s and velocity of x's
    shape. Noise and s belong to the sample, whoever computes it."""
    eps = common.noise(x.shape[1:], index, seed, x.device)
    u = torch.sigmoid(common.noise((), index, seed, x.device, purpose=1))  # logit-normal, as SANA was trained
    s = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    pure = torch.special.ndtr(common.noise((), index, seed, x.device, purpose=4)) < PURE_NOISE
    s = torch.where(pure, 1.0, s)
    at = s[:, None, None, None]
    return (1 - at) * x + at * eps, s, eps - x


def action_terms(actions: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Sums over valid entries (2,): squared error of the moving dimensions, cross-entropy of the grippers (logits).

    actions, target and mask: (B, A, 44)."""
    error = (actions - target).float().square() * mask
    bce = F.binary_cross_entropy_with_logits(actions.float()[..., GRIPPERS], target[..., GRIPPERS], reduction="none")
    return torch.stack([error[..., MOTION].sum(), (bce * mask[..., GRIPPERS]).sum()])


def valid_counts(mask: Tensor) -> Tensor:
    """How many valid entries a batch has: (moving dimensions, grippers)."""
    return torch.stack([mask[..., MOTION].sum(), mask[..., GRIPPERS].sum()]).float()


def lam_loss(
    velocity: Tensor, target_velocity: Tensor, actions: Tensor | None, batch: dict, counts: Tensor, lambda_a: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_frame + lambda_a L_action, and its parts.

    velocity and target (B, C, h, w); actions (B, A, 44) or None; counts (2,) > 0: what the sums over valid moving
    dimensions and grippers are divided by, so that the mean can be taken over more than this batch."""
    frame = F.mse_loss(velocity.float(), target_velocity)  # L_frame
    parts = {"frame": frame.detach()}
    if actions is None:  # without the unified action decoder
        return frame, parts
    motion, gripper = action_terms(actions, batch["action"], batch["action_mask"]) / counts  # L_action is their sum
    parts |= {"motion": motion.detach(), "gripper": gripper.detach()}
    return frame + lambda_a * (motion + gripper), parts


# --------------------------------------------------------------------------------------------------------------------
# Sampling and validation
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_frame(
    model: LAM, current: Tensor, z: tuple[Tensor, Tensor], index: Tensor, seed: int, steps: int = 20
) -> Tensor:
    """The latents (B, C, h, w) of V_{t+k}, from V_t's latents and a latent action, by `steps` Euler steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    scheduler.set_timesteps(steps, device=current.device)
    x = common.noise(current.shape[1:], index, seed, current.device)
    for t in scheduler.timesteps:
        velocity, _ = model.decode(x, current, (t / 1000).expand(len(x)), z)
        x = scheduler.step(velocity.float(), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def decode_actions(model: LAM, current: Tensor, z: tuple[Tensor, Tensor], index: Tensor, seed: int) -> Tensor:
    """The actions (B, A, 44) that a latent action stands for, normalised, grippers as probabilities of being open. Read
    out at s = 1: the scene stream sees noise, so everything comes from V_t and Z."""
    x = common.noise(current.shape[1:], index, seed, current.device)
    _, actions = model.decode(x, current, torch.ones(len(x), device=x.device), z)
    actions = actions.float().clone()
    actions[..., GRIPPERS] = actions[..., GRIPPERS].sigmoid()
    return actions


def mean_action(windows: Windows, samples: int = 256) -> Tensor:
    """The mean normalised action (44,) of the training stream: what a model that sees nothing would predict."""
    total, count = torch.zeros(len(common.ACTION_NAMES)), torch.zeros(len(common.ACTION_NAMES))
    for i in range(samples):
        sample = windows.draw(i, pictures=False)
        total += (sample["action"] * sample["action_mask"]).sum(0)
        count += sample["action_mask"].sum(0)
    return total / count.clamp(min=1)


@torch.no_grad()
def validate(model: LAM, codec, windows: Windows, mean: Tensor, args: Args, process: Process) -> dict[str, float]:
    """Held-out losses, and the error of the decoded actions beside that of always predicting the mean action."""
    model.eval()
    total = torch.zeros(6, device=process.device)
    for first in range(0, args.val_samples, args.batch):
        rows = range(first, min(first + args.batch, args.val_samples))
        batch = common.to_device(common.collate([windows[i] for i in rows]), process.device)
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            current, future = codec.encode(batch["video"][:, 0]), codec.encode(batch["video"][:, -1])
            noisy, s, velocity = flow(future, batch["index"], args.seed)
            predicted, _ = model(batch["video"], batch["instruction"], noisy, current, s)
            total[0] += F.mse_loss(predicted.float(), velocity) * len(rows)
            if args.uad:
                ones = torch.ones_like(s)
                blank = common.noise(current.shape[1:], batch["index"], args.seed, process.device, purpose=2)
                _, actions = model(batch["video"], batch["instruction"], blank, current, ones)
                counts = valid_counts(batch["action_mask"])
                motion = action_terms(actions, batch["action"], batch["action_mask"])[0]
                baseline = action_terms(mean.to(actions).expand_as(actions), batch["action"], batch["action_mask"])[0]
                open_ = (actions[..., GRIPPERS] > 0) == (batch["action"][..., GRIPPERS] > 0.5)
                right = (open_ * batch["action_mask"][..., GRIPPERS]).sum()
                total[1:] += torch.stack([motion, baseline, right.float(), counts[0], counts[1]])
    model.train()
    values = {"val_frame": total[0].item() / args.val_samples}
    if args.uad:
        motion, baseline, right, n, grippers = total[1:].tolist()
        values |= {"val_motion": motion / max(n, 1), "val_motion_mean": baseline / max(n, 1)}
        values |= {"val_r2": 1 - motion / max(baseline, 1e-9), "val_gripper_accuracy": right / max(grippers, 1)}
    return values


# --------------------------------------------------------------------------------------------------------------------
# Data, sharding
# --------------------------------------------------------------------------------------------------------------------


def make_windows(args: Args, split: str) -> Windows:
    views = {"video": View(args.camera, args.frames, args.image_size)}
    seed = args.seed if split == "train" else args.seed + 10_000
    sources, weights = mixture.expand(args.data, args.weights)
    return Windows(sources, views, args.frames - 1, args.hz, seed, weights, split if args.val_every else "all",
                   args.val_every, preload=args.preload)  # fmt: skip


def shard(model: LAM, process: Process) -> None:
    """FSDP2: every transformer layer is a unit that is gathered when needed, then the rest."""
    if process.world == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=process.dtype, reduce_dtype=torch.float32)
    vlm, decoder = model.encoder.vlm, model.decoder
    for layers in (vlm.vision_tower.encoder.layer, vlm.language_model.layers, decoder.sana.transformer_blocks,
                   decoder.motion, decoder.to_scene):  # fmt: skip
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
    # The root keeps its inputs as they are: a noise level s in bfloat16 would have three digits.
    fully_shard(model, mp_policy=replace(policy, cast_forward_inputs=False))


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(args: Args, process: Process) -> None:
    run, kept = common.open_run(args.out, args, process, args.resume)
    windows = make_windows(args, "train")
    held_out = make_windows(args, "val") if args.val_every else windows
    model = build(args, kept).to(process.device).train()
    start = 0
    if kept:
        start = common.load_meta(kept)["step"]
        common.check_resume(kept, windows)
        common.load_weights(model, kept)
    codec = load_codec(args.decoder, model.decoder.config.in_channels, process)
    tokenizer = model.encoder.tokenizer
    meta = {"stage": "lam", "args": asdict(args), "encoder_config": model.encoder.config.to_dict(),
            "decoder_config": dict(model.decoder.config), "statistics": windows.statistics()}  # fmt: skip
    if process.main:
        print(mixture.summary(args.data, windows))
        print(f"parameters: encoder {count(model.encoder):.2f} M, decoder {count(model.decoder):.2f} M, "
              f"trained {count(model, trained=True):.2f} M; commit {common.git_commit()}")  # fmt: skip
    shard(model, process)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    if kept:
        common.load_optimizer(model, optimizer, kept)
    mean = mean_action(windows)
    log = common.MetricsLog(run, start, args.steps, process, "lam")
    data = common.stream(windows, args.batch, start, process, args.accumulate, args.workers)
    skipped = 0
    if start == 0:
        log.write(0, validate(model, codec, held_out, mean, args, process))

    for step in range(start, args.steps):
        began = time.perf_counter()
        batches = next(data)
        waited = time.perf_counter() - began
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, args.steps, args.lr, args.min_lr, args.warmup)
        # Gradients are averaged over ranks and micro-steps: dividing by each one's share of the global count makes that
        # the mean over all valid entries of the global batch, however they are spread.
        counts = process.sum(sum(valid_counts(b["action_mask"]) for b in batches)).clamp(min=1)
        counts = counts / (process.world * args.accumulate)
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                current, future = codec.encode(batch["video"][:, 0]), codec.encode(batch["video"][:, -1])
                noisy, s, velocity = flow(future, batch["index"], args.seed)
                predicted, actions = model(batch["video"], batch["instruction"], noisy, current, s)
                loss, parts = lam_loss(predicted, velocity, actions, batch, counts, args.lambda_a)
            (loss / args.accumulate).backward()
            for k, v in parts.items():
                totals[k] = totals.get(k, 0) + v / args.accumulate
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if torch.isfinite(norm):
            optimizer.step()
            skipped = 0
        elif (skipped := skipped + 1) == 5:
            raise InputError(f"five steps in a row with a non-finite gradient, the last at step {step}: lower --lr "
                             f"({args.lr}) or look at the data, and start from the last checkpoint with --resume")
        optimizer.zero_grad(set_to_none=True)
        log.bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            values = {k: (process.sum(v) / process.world).item() for k, v in sorted(totals.items())}
            values |= {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
            log.write(done, values | {"seconds": time.perf_counter() - began, "wait": waited})
        if done % args.save_every == 0 or done == args.steps:
            log.write(done, validate(model, codec, held_out, mean, args, process))
            common.save_checkpoint(run, done, model, optimizer, meta, tokenizer, process)
    log.close()
    if process.main:
        print(f"done: {run}")
    del model, optimizer, trained  # before the process group goes (see common.teardown)


def count(module: nn.Module, trained: bool = False) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    common.check_training(args)
    common.at_least(args, frames=2, scene_tokens=1, motion_tokens=1, latent_dim=1, motion_width=1, motion_heads=1)
    common.at_least(args, lambda_a=0, hz=1e-3)
    process = common.setup(args.seed)
    train(args, process)
    common.teardown(process)


if __name__ == "__main__":
    common.run_main(main)
