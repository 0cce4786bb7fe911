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
    torchrun --nproc-per-node 16 lam.py --data A B C         the paper's run; on two nodes with one file system:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 lam.py --replicas 2 --data A B

Reads LeRobot data sets (--data). Writes runs/<preset>/lam/: args.json, metrics.jsonl, checkpoints/step_*/ with the
encoder and the decoder (the frozen image codec is not copied). `distill.py` reads the encoder from there.

Where we depart from the paper, or fill in what it does not say:
 1. Z is the VLM's last hidden state at the [CP_SCE] and [CP_MOT] positions, passed through norm, linear, norm: the
    distillation target (Eq. 4) then has unit scale. The paper gives no head.
 2. [CP_SCE] and [CP_MOT] stand for 64 positions each, with 64 learned embeddings each.
 3. The future frame is learned by rectified flow, as SANA was trained: x_s = (1-s) x + s noise, velocity = noise - x,
    s logit-normal with shift 3, and s = 1 for half of the samples. V_t enters through zero-initialised input
    channels, beside SANA's own. At full size the scene stream's output is that velocity. At --tiny and --small it is
    a correction of V_t, x = V_t + output, and the velocity follows as (x_s - x) / s: a velocity contains the noise,
    for which narrow tokens have no room (as JiT found, arXiv 2511.13720), and most of a frame stays as it was. L_frame
    is then the error of x, which is s^2 times that of the velocity.
 4. The exchange is one cross-attention in each direction after every SANA block. The one into the scene stream is
    multiplied by a gate that starts at zero, so that at initialisation the scene stream is SANA to the last bit. The
    motion stream knows the noise level s; actions are read out at s = 1, where the scene stream sees only noise, so
    what it knows about the future can only come from Z. Learned places tell the tokens of Z apart. In training each
    direction of the exchange is cut for half of the samples: so Z_mot has to carry the actions by itself and Z_sce the
    frame, where otherwise one of them could do the work of both.
 5. L = L_frame + lambda_a L_action with lambda_a = 1, at --tiny 0.1 and at --small 0.3, since the error of x is some
    twenty times smaller than that of a velocity. L_action: squared error over moving dimensions, and lambda_g = 0.1
    times the binary cross-entropy over grippers (at --tiny, 300 steps long, all of it), each averaged over all valid
    entries of the global batch. With lambda_g = 1 the grippers' gradient on the encoder was six times the motion's,
    and the motion took twice as many steps. Samples without actions add L_frame alone. The ablations of Table 5 change
    the flow of data and leave the parameters as they are (to 2 %). Without UAD both streams stay, but no action is
    decoded and no action error comes back: the motion tokens could only help to draw the frame, and at --small they do
    not (results/REPORT.md). Without DLA all Ns + Nm tokens are what both streams read; the template still introduces
    them in two halves.
 6. 10 Hz, 448 px for encoder and decoder, and the number of steps are ours; the paper gives days of 16 A100s.
 7. At --tiny and --small nothing is pretrained: the vision encoder is trained too (a frozen random one sees nothing),
    and an invertible pixel-unshuffle stands in for the DC-AE autoencoder. --small sees 8 frames at 5 Hz, 1.4 s,
    instead of 16 at 10 Hz, 1.5 s.
 8. Weight decay 0.01 and gradient clipping at 1 are ours. At --small Muon trains the matrices of the layers, which from
    random weights takes half the steps (results/LOG.md), and a window's pictures are shifted and lit a little
    differently each time it is drawn; everywhere else AdamW trains all, as in Sec. 6.3, on the pictures as they are.
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
from common import GRIPPERS, MOTION, InputError, Process
from data import mixture
from data.windows import View, Windows, augment, check_resume, held_out_batches, stream

# Shapes: B batch, T frames, A = T-1 action steps, L text positions, N latent tokens (Ns scene, Nm motion), D their
# width, C x h x w image latents, S the scene stream's width, W the motion stream's.

SANA_SIZES: dict[str, dict[str, Any]] = {  # decoders from random weights (our choice)
    # Patches of 4 x 4 and 8 x 8 pixels. SANA tells places apart by its convolutions alone; with two to four layers,
    # sine and cosine embeddings help it.
    "sana-tiny": dict(
        num_layers=2, num_attention_heads=4, attention_head_dim=32, num_cross_attention_heads=4,
        cross_attention_head_dim=32, cross_attention_dim=128, in_channels=48, out_channels=48, sample_size=16,
        interpolation_scale=1,
    ),
    "sana-small": dict(
        num_layers=3, num_attention_heads=6, attention_head_dim=32, num_cross_attention_heads=6,
        cross_attention_head_dim=32, cross_attention_dim=192, in_channels=192, out_channels=192, sample_size=12,
        interpolation_scale=1,
    ),
}  # fmt: skip
FLOW_SHIFT = 3.0  # SANA's own: more training on high noise
MIN_NOISE = 0.05  # below it, a velocity derived from a guess at the frame counts no more (JiT, arXiv 2511.13720)


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
    """Unified action decoder: off, actions are neither decoded nor supervised. (Table 5)"""
    dla: bool = True
    """Decoupled latent actions: off, one undivided set of Ns + Nm tokens feeds both streams. (Table 5)"""
    augment: bool = False
    """Shift all frames of a training window alike by up to 6 %, and vary brightness and contrast. (our choice)"""
    lambda_a: float = 1.0
    """Weight of L_action. (our choice)"""
    lambda_g: float = 0.1
    """Weight of the grippers' cross-entropy within L_action: in nats it is larger than squared errors of normalised
    actions, and so is its gradient, six times on the encoder. (our choice)"""
    pure_noise: float = 0.5
    """Share of samples at noise level 1, where actions are read out; SANA's schedule has almost none. (our choice)"""
    cut_exchange: float = 0.5
    """Share of samples for which each direction of the exchange between the streams is cut. (our choice)"""
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
    """Weight decay, AdamW's and Muon's. (our choice)"""
    muon: float = 0.0
    """Peak learning rate of Muon for the matrices of the layers, while AdamW has the rest; 0: AdamW has all, as in
    Sec. 6.3. (our choice)"""
    clip: float = 1.0
    """Largest norm of the gradient. (our choice)"""
    cpu_bf16: bool = False
    """On a CPU that has instructions for it, multiply matrices in bfloat16, as GPUs always do. (our choice)"""
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
    max_bad: float = 0.01
    """Share of samples that may fall on damaged episodes, and be drawn anew, before the run stops. (our choice)"""
    replicas: int = 1
    """Copies of the sharded model: 1 shards it over all GPUs (FSDP), the number of nodes within each (HSDP)."""
    seed: int = 0
    """Seed of the initialisation, the data stream and the noise."""


TINY = Args(
    data=("data/tiny",), out="runs/tiny/lam", encoder="internvl-tiny", decoder="sana-tiny", freeze_vision=False,
    frames=4, image_size=64, scene_tokens=8, motion_tokens=8, latent_dim=128, motion_width=128, motion_heads=4,
    lambda_a=0.1, lambda_g=1, batch=8, accumulate=1, steps=300, lr=5e-4, min_lr=1e-5, warmup=10, checkpointing=False,
    val_every=15, val_samples=64, save_every=100, log_every=10, workers=0, preload=True,
)  # fmt: skip
SMALL = Args(
    data=("runs/data/five_tasks",), out="runs/small/lam", encoder="internvl-small", decoder="sana-small",
    freeze_vision=False, frames=8, hz=5, image_size=96, scene_tokens=16, motion_tokens=16, latent_dim=256,
    motion_width=192, motion_heads=6, augment=True, lambda_a=0.3, batch=16, accumulate=1, steps=5200, lr=1e-3,
    min_lr=1e-5, warmup=100, muon=4e-3, cpu_bf16=True, checkpointing=False, val_every=10, val_samples=256,
    save_every=200, log_every=20, workers=0, preload=True,
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
        self.queries = nn.Parameter(torch.randn(scene_tokens + motion_tokens, width) * 0.02)  # as Qwen's words are
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, latent_dim), nn.LayerNorm(latent_dim, elementwise_affine=False)
        )

    def tokenize(self, instructions: list[str], frames: int) -> tuple[Tensor, Tensor]:
        """Token ids and their kind (0 text or padding, 1 image, 2 latent), (B, L) each. Padding is on the right, where
        nothing that the causal model is asked for can see it.

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
        return ids, kind

    def forward(self, video: Tensor, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """video uint8 (B, T, 3, H, H) -> Z_sce (B, Ns, D), Z_mot (B, Nm, D).  (Eq. 1)"""
        ids, kind = (x.to(video.device) for x in self.tokenize(instructions, video.shape[1]))
        embeds = self.vlm.get_input_embeddings()(ids)  # (B, L, width)
        pixels = common.normalize_pixels(rearrange(video, "b t c h w -> (b t) c h w"), "internvl", embeds.dtype)
        images = self.vlm.get_image_features(pixel_values=pixels).pooler_output  # (B T, n, width)
        latents = repeat(self.queries, "n d -> b n d", b=len(video))
        embeds = embeds.masked_scatter((kind == 1)[..., None], images.to(embeds.dtype))
        embeds = embeds.masked_scatter((kind == 2)[..., None], latents.to(embeds.dtype))
        hidden = self.vlm.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
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


def spread(module: nn.Module) -> None:
    """Gives every linear layer weights of standard deviation 1 / sqrt(inputs), so that what it reads keeps its scale:
    torch's own start is 1.7 times smaller. (our choice)"""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


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

    def forward(self, x: Tensor, z_mot: Tensor, scene: Tensor, exchange: Tensor) -> Tensor:
        x = x + self.itself(h := self.norms[0](x), h)
        x = x + self.latent(self.norms[1](x), z_mot)
        x = x + exchange * self.scene(self.norms[2](x), self.scene_norm(scene))
        return x + self.mlp(self.norms[3](x))


class MotionToScene(nn.Module):
    """The exchange's other direction: scene tokens (B, hw, S) read the motion (B, N, context), through a gate that
    starts closed."""

    def __init__(self, scene_width: int, context: int, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(scene_width)
        self.attention = Attention(scene_width, context, width, heads)
        self.gate = nn.Parameter(torch.zeros(scene_width))

    def forward(self, scene: Tensor, motion: Tensor, exchange: Tensor) -> Tensor:
        return scene + exchange * self.gate * self.attention(self.norm(scene), motion)


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
        tokens = (args.scene_tokens, args.motion_tokens) if args.dla else (args.scene_tokens + args.motion_tokens,) * 2
        self.places = nn.ParameterList(nn.Parameter(torch.randn(n, args.latent_dim)) for n in tokens)
        self.checkpointing, self.uad = args.checkpointing, args.uad
        self.corrects = args.decoder in SANA_SIZES  # the output is a correction of V_t, else the velocity (see 3 above)
        if self.corrects:
            spread(sana)
            nn.init.zeros_(sana.proj_out.weight)  # the first guess is V_t itself
        w, heads, layers = args.motion_width, args.motion_heads, range(sana.config.num_layers)
        self.to_scene = nn.ModuleList(MotionToScene(width, w, w, heads) for _ in layers)
        self.motion = nn.ModuleList(MotionLayer(w, heads, args.latent_dim, width) for _ in layers)
        spread(self.motion)
        spread(self.to_scene)
        self.queries = nn.Parameter(torch.randn(args.frames - 1, w) * 0.3)
        self.noise_level = nn.Linear(width, w)
        if args.uad:
            self.action_head = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, len(common.ACTION_NAMES)))

    def layer(
        self, v: int, scene: Tensor, motion: Tensor, caption: Tensor, z_mot: Tensor, t: Tensor, hw: tuple[int, int],
        exchange: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Layer v of both streams: (scene (B, hw, S), motion (B, A, W)) -> the same. exchange (2, B or 1, 1, 1): 0
        where a sample's attention from motion to scene tokens, or from scene to motion tokens, is cut; else 1."""
        scene = self.sana.transformer_blocks[v](
            scene, encoder_hidden_states=caption, timestep=t, height=hw[0], width=hw[1]
        )
        motion = self.motion[v](motion, z_mot, scene, exchange[0])
        return self.to_scene[v](scene, motion, exchange[1]), motion

    def forward(
        self, noisy: Tensor, current: Tensor, s: Tensor, z_sce: Tensor, z_mot: Tensor, exchange: Tensor | None = None
    ):
        """noisy and current (B, C, h, w): latents of V_{t+k} at noise level s (B,) in [0, 1], and of V_t.
        exchange (B, 2): as `draw_exchange` gives it; None: all of it.

        Returns the velocity (B, C, h, w) and the actions (B, A, 44), normalised, gripper columns as logits; None
        without the unified action decoder."""
        p = self.config.patch_size
        hw = (noisy.shape[2] // p, noisy.shape[3] // p)
        z_sce, z_mot = z_sce + self.places[0], z_mot + self.places[1]
        scene = self.sana.patch_embed(noisy) + rearrange(self.current(current), "b s h w -> b (h w) s")
        t, embedded = self.sana.time_embed(s * 1000, batch_size=len(noisy), hidden_dtype=scene.dtype)
        caption = self.sana.caption_norm(self.sana.caption_projection(self.to_caption(z_sce)))
        motion = repeat(self.queries, "a w -> b a w", b=len(noisy)) + self.noise_level(F.silu(embedded))[:, None]
        if exchange is None:
            exchange = noisy.new_ones(len(noisy), 2)
        exchange = rearrange(exchange, "b two -> two b 1 1").to(scene.dtype)
        for v in range(self.config.num_layers):
            if self.checkpointing and torch.is_grad_enabled():
                parts = v, scene, motion, caption, z_mot, t, hw, exchange
                scene, motion = checkpoint(self.layer, *parts, use_reentrant=False)
            else:
                scene, motion = self.layer(v, scene, motion, caption, z_mot, t, hw, exchange)
        out = self.sana.proj_out(self.sana.norm_out(scene, embedded, self.sana.scale_shift_table))
        out = rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=hw[0], p=p, q=p).contiguous()
        if self.corrects:  # what separates x_s from the guess at x, per unit of s
            out = (noisy - current - out.float()) / s.clamp(min=MIN_NOISE)[:, None, None, None]
        return out, self.action_head(motion) if self.uad else None


class LAM(nn.Module):
    """The latent action model: `model(video, instructions, noisy, current, s)` for training; `encode` and `decode` are
    its halves (of an unsharded model)."""

    def __init__(self, encoder: Encoder, decoder: Decoder, dla: bool):
        super().__init__()
        self.encoder, self.decoder, self.dla = encoder, decoder, dla

    def encode(self, video: Tensor, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """(Z_sce, Z_mot) as the decoder takes them."""
        return self.sets(*self.encoder(video, instructions))

    def sets(self, z_sce: Tensor, z_mot: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the encoder, or foreseen ones, as the decoder takes them: without DLA both streams read all."""
        return (z_sce, z_mot) if self.dla else (torch.cat([z_sce, z_mot], 1),) * 2

    def decode(
        self, noisy: Tensor, current: Tensor, s: Tensor, z: tuple[Tensor, Tensor], exchange: Tensor | None = None
    ):
        """What `Decoder.forward` returns, for a latent action as `encode` gives it."""
        return self.decoder(noisy, current, s, *z, exchange)

    def forward(
        self, video: Tensor, instructions: list[str], noisy: Tensor, current: Tensor, s: Tensor,
        exchange: Tensor | None = None, zero: str = "",
    ):  # fmt: skip
        """What `decode` returns. zero: "scene" or "motion" blanks that set of tokens, to see what it was good for."""
        z_sce, z_mot = self.encode(video, instructions)
        z = (z_sce * 0 if zero == "scene" else z_sce, z_mot * 0 if zero == "motion" else z_mot)
        return self.decode(noisy, current, s, z, exchange)


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
    """A pretrained part of a diffusers pipeline, from a folder or a hub name. Raises InputError where it is absent,
    damaged, of another class, or where its tensors are not those that its config.json describes."""
    try:
        config = kind.load_config(source, subfolder=subfolder)
        if config.get("_class_name") != kind.__name__:
            raise ValueError(f"it is a {config.get('_class_name')}")
        tensors = common.published_tensors(source, subfolder)
    except common.LOADING_ERRORS as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"no {kind.__name__} in {source}/{subfolder} ({why}): give --decoder a local folder, a "
                         f"reachable hub name, or one of {sorted(SANA_SIZES)}") from None  # fmt: skip
    model = kind.from_config(config)
    common.load_tensors(model, tensors, f"{source}/{subfolder}")
    return model.to(dtype)


def load_codec(decoder: str, channels: int, process: Process) -> PixelCodec | DeepCodec:
    """The image codec that belongs to a decoder with so many input channels. Raises InputError where the weights
    cannot be found, or make other latents."""
    if decoder in SANA_SIZES:
        return PixelCodec(math.isqrt(channels // 3))
    codec = DeepCodec(decoder, process.device, process.dtype)
    if codec.vae.config.latent_channels != channels:
        raise InputError(f"the autoencoder of {decoder} makes {codec.vae.config.latent_channels} channels, its "
                         f"transformer takes {channels}: point --decoder to one pipeline")  # fmt: skip
    return codec


def check(args: Args) -> None:
    """Raises InputError for options out of range."""
    common.check_training(args)
    common.at_least(args, frames=2, scene_tokens=1, motion_tokens=1, latent_dim=1, motion_width=1, motion_heads=1)
    common.at_least(args, lambda_a=0, lambda_g=0, hz=1e-3, pure_noise=0, cut_exchange=0)
    if args.pure_noise > 1 or args.cut_exchange > 1:
        raise InputError(f"--pure-noise {args.pure_noise:g}, --cut-exchange {args.cut_exchange:g}: shares end at 1")


def build(args: Args, checkpoint: Path | None = None) -> LAM:
    """The model: from pretrained weights (with a printed report of what was loaded, is new or is left over), from
    random ones, or with the architecture of a checkpoint, to be filled.

    Raises InputError for sizes that do not fit each other and for weights that are absent or of another family."""
    meta = common.load_meta(checkpoint) if checkpoint else {}
    vlm, tokenizer = common.load_vlm(args.encoder, meta.get("encoder_config"), checkpoint)
    if checkpoint:
        sana = SanaTransformer2DModel.from_config(meta["decoder_config"])
    elif args.decoder in SANA_SIZES:
        sana = SanaTransformer2DModel(**SANA_SIZES[args.decoder], caption_channels=args.latent_dim)
    else:
        sana = load_part(SanaTransformer2DModel, args.decoder, "transformer", torch.float32)
    model = assemble(args, vlm, tokenizer, sana)
    pretrained = {args.encoder: vlm, args.decoder: sana}
    pretrained = {k: v for k, v in pretrained.items() if k not in common.VLM_SIZES and k not in SANA_SIZES}
    if pretrained and not checkpoint:
        common.report_loading(model, pretrained)
    return model


def assemble(args: Args, vlm: nn.Module, tokenizer: Any, sana: SanaTransformer2DModel) -> LAM:
    """The model from its two pretrained halves, on whatever device they are. Raises InputError as `build` does."""
    if args.motion_width % args.motion_heads:
        raise InputError(f"--motion-width {args.motion_width} is no multiple of --motion-heads {args.motion_heads}")
    encoder = Encoder(vlm, tokenizer, args.scene_tokens, args.motion_tokens, args.latent_dim)
    side = encoder.config.vision_config.image_size[0]
    if args.image_size != side:
        raise InputError(f"--image-size {args.image_size}, but {args.encoder} takes {side} pixels")
    if args.encoder in common.VLM_SIZES:  # as large as what a random vision encoder says
        nn.init.normal_(encoder.queries, std=0.5)
    encoder.vlm.vision_tower.requires_grad_(not args.freeze_vision)
    if args.checkpointing:
        # Not the whole of it: a frozen vision encoder would keep its layers' inputs and be run backwards, for nothing.
        encoder.vlm.language_model.activation_checkpointing_enable()
        if not args.freeze_vision:
            encoder.vlm.vision_tower.activation_checkpointing_enable()
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


def flow(x: Tensor, index: Tensor, seed: int, pure_noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """A point on the straight line from data x (B, C, h, w) to noise: (x_s, s (B,), velocity), x_s and velocity of x's
    shape. s = 1 for a share `pure_noise` of the samples. Noise and s belong to the sample, whoever computes it."""
    eps = common.noise(x.shape[1:], index, seed, x.device)
    u = torch.sigmoid(common.noise((), index, seed, x.device, purpose=1))  # logit-normal, as SANA was trained
    s = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    pure = torch.special.ndtr(common.noise((), index, seed, x.device, purpose=4)) < pure_noise
    s = torch.where(pure, 1.0, s)
    at = s[:, None, None, None]
    return (1 - at) * x + at * eps, s, eps - x


def draw_exchange(index: Tensor, seed: int, cut: float) -> Tensor:
    """Which directions of the exchange between the streams are open, (B, 2) of 0 and 1: scene to motion, motion to
    scene. Each is cut for a share `cut` of the samples (our choice)."""
    return (torch.special.ndtr(common.noise((2,), index, seed, index.device, purpose=5)) >= cut).float()


def frame_weight(s: Tensor, args: Args) -> Tensor:
    """What makes an error of the velocity one of L_frame, (B, 1, 1, 1): 1, or s where L_frame is the error of x."""
    return (s if args.decoder in SANA_SIZES else torch.ones_like(s))[:, None, None, None]


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
    velocity: Tensor, target_velocity: Tensor, actions: Tensor | None, batch: dict, counts: Tensor, lambda_a: float,
    lambda_g: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """L = L_frame + lambda_a L_action, and its parts; L_action = motion + lambda_g gripper.

    velocity and target (B, C, h, w); actions (B, A, 44) or None; counts (2,) > 0: what the sums over valid moving
    dimensions and grippers are divided by, so that the mean can be taken over more than this batch."""
    frame = F.mse_loss(velocity.float(), target_velocity)  # L_frame
    parts = {"frame": frame.detach()}
    if actions is None:  # without the unified action decoder
        return frame, parts
    motion, gripper = action_terms(actions, batch["action"], batch["action_mask"]) / counts
    parts |= {"motion": motion.detach(), "gripper": gripper.detach()}
    return frame + lambda_a * (motion + lambda_g * gripper), parts


def micro_step(model: nn.Module, codec: Any, batch: dict, counts: Tensor, args: Args):
    """The loss of a batch, to go backwards from, and its parts. counts (2,): see `lam_loss`."""
    video = batch["video"]
    if args.augment:  # as one picture of 3 T channels
        alike = augment(rearrange(video, "b t c h w -> b 1 (t c) h w"), batch["index"], args.seed)
        video = rearrange(alike, "b 1 (t c) h w -> b t c h w", c=3)
    current, future = codec.encode(video[:, 0]), codec.encode(video[:, -1])
    noisy, s, velocity = flow(future, batch["index"], args.seed, args.pure_noise)
    exchange = draw_exchange(batch["index"], args.seed, args.cut_exchange)
    predicted, actions = model(video, batch["instruction"], noisy, current, s, exchange)
    weight = frame_weight(s, args)
    return lam_loss(predicted * weight, velocity * weight, actions, batch, counts, args.lambda_a, args.lambda_g)


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


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of the uint8 images (B, 3, H, W): (B,), at most 78."""
    mse = (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-3)
    return 10 * torch.log10(255**2 / mse)


HEALTH = ("psnr", "psnr_copy", "right", "frame", "motion", "frame_zero_sce", "motion_zero_sce", "frame_zero_mot",
          "motion_zero_mot")  # fmt: skip


@torch.no_grad()
def health(model: LAM, codec, batch: dict, current: Tensor, future: Tensor, args: Args) -> Tensor:
    """Sums over the counted samples of a batch, one for each name in HEALTH, read out at s = 1, where all that is
    known of V_{t+k} comes from V_t and Z. First dB of the one-step estimate of V_{t+k}, beside V_t left as it is; and
    gripper commands on the right side. Then squared errors, of that estimate's latents (mean over a sample) and of the
    actions (summed): with Z as it is, without Z_sce, without Z_mot. Zero where an ablated model has no such thing. Only
    `model(...)` is called, so a sharded model will do."""
    noise = common.noise(current.shape[1:], batch["index"], args.seed, current.device, purpose=2)
    s = torch.ones(len(noise), device=noise.device)
    mask, counted = batch["action_mask"], batch["counted"]
    sums = torch.zeros(len(HEALTH), device=noise.device)
    for i, zero in enumerate(("", "scene", "motion") if args.dla else ("",)):
        velocity, actions = model(batch["video"], batch["instruction"], noise, current, s, zero=zero)
        estimate = noise - velocity.float()
        sums[3 + 2 * i] = (estimate - future).square().mean((1, 2, 3)).mul(counted).sum()
        if args.uad:
            sums[4 + 2 * i] = action_terms(actions, batch["action"], mask)[0]
        if not zero:
            first, last = batch["video"][:, 0], batch["video"][:, -1]
            sums[:2] = torch.stack([psnr(codec.decode(estimate), last), psnr(first, last)]).mul(counted).sum(1)
            if args.uad:
                right = (actions[..., GRIPPERS] > 0) == (batch["action"][..., GRIPPERS] > 0.5)
                sums[2] = (right * mask[..., GRIPPERS]).sum()
    return sums


@torch.no_grad()
def validate(model: LAM, codec, windows: Windows, mean: Tensor, args: Args, process: Process) -> dict[str, float]:
    """Held-out losses, the error of the decoded actions beside that of always predicting the mean action, the one-step
    estimate's PSNR beside that of copying V_t, and how many times larger an error becomes without Z_sce or Z_mot. The
    ranks share the windows; their sums, and so the values, do not depend on how many there are."""
    model.eval()
    total = torch.zeros(4 + len(HEALTH), device=process.device)
    for batch in held_out_batches(windows, args.val_samples, args.batch, process):
        target, mask = batch["action"], batch["action_mask"]
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            current, future = codec.encode(batch["video"][:, 0]), codec.encode(batch["video"][:, -1])
            noisy, s, velocity = flow(future, batch["index"], args.seed, args.pure_noise)
            predicted, _ = model(batch["video"], batch["instruction"], noisy, current, s)
            error = ((predicted.float() - velocity) * frame_weight(s, args)).square().mean((1, 2, 3))
            total[0] += (error * batch["counted"]).sum()
            total[4:] += health(model, codec, batch, current, future, args)
        total[1] += action_terms(mean.to(target).expand_as(target), target, mask)[0]
        total[2:4] += valid_counts(mask)
    model.train()
    frame, baseline, n, grippers, *sums = process.sum(total).tolist()
    h = dict(zip(HEALTH, sums, strict=True))
    values = {"val_frame": frame / args.val_samples}
    values |= {f"val_{k}": h[k] / args.val_samples for k in ("psnr", "psnr_copy")}
    if args.uad:
        values |= {"val_motion": h["motion"] / max(n, 1), "val_motion_mean": baseline / max(n, 1)}
        values["val_r2"] = 1 - h["motion"] / max(baseline, 1e-9)
        values["val_gripper_accuracy"] = h["right"] / max(grippers, 1)
    for part in ("frame", "motion") if args.uad else ("frame",):
        for zero in ("zero_sce", "zero_mot") if args.dla else ():
            values[f"val_{part}_{zero}"] = h[f"{part}_{zero}"] / max(h[part], 1e-9)
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
    """FSDP2 or HSDP: every transformer layer is a unit that is gathered when needed, then the rest."""
    if process.world == 1:
        return
    from torch.distributed.fsdp import fully_shard

    how = common.sharding(process)
    vlm, decoder = model.encoder.vlm, model.decoder
    for layers in (vlm.vision_tower.encoder.layer, vlm.language_model.layers, decoder.sana.transformer_blocks,
                   decoder.motion, decoder.to_scene):  # fmt: skip
        for layer in layers:
            fully_shard(layer, **how)
    # The root keeps its inputs as they are: a noise level s in bfloat16 would have three digits.
    fully_shard(model, mesh=how["mesh"], mp_policy=replace(how["mp_policy"], cast_forward_inputs=False))


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(args: Args, process: Process) -> None:
    run, kept = common.open_run(args.out, args, process, args.resume)
    windows = make_windows(args, "train")
    held_out = make_windows(args, "val") if args.val_every else windows
    model = build(args, kept).to(process.device).train()
    model.encoder.tokenize([windows.longest_instruction()], args.frames)  # too long: rather said now than in a week
    start, tally = 0, {"bad": 0, "skipped": 0}
    if kept:
        then = common.load_meta(kept)
        start, tally = then["step"], tally | then.get("tally", {})
        check_resume(kept, windows)
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
    optimizer = common.Optimizers(model, args)
    if kept:
        common.load_optimizer(model, optimizer, kept)
    mean = mean_action(windows)
    log = common.MetricsLog(run, start, args.steps, process, "lam")
    data = stream(windows, args.batch, start, process, args.accumulate, args.workers, tally, args.max_bad)
    update = common.Updates(optimizer, args.clip, process, tally)
    if start == 0:
        log.write(0, validate(model, codec, held_out, mean, args, process))

    for step in range(start, args.steps):
        began = time.perf_counter()
        batches = next(data)
        waited = time.perf_counter() - began
        optimizer.rate(common.learning_rate(step, args.steps, args.lr, args.min_lr, args.warmup))
        # Gradients are averaged over ranks and micro-steps: dividing by each one's share of the global count makes that
        # the mean over all valid entries of the global batch, however they are spread.
        counts = process.sum(sum(valid_counts(b["action_mask"]) for b in batches)).clamp(min=1)
        counts = counts / (process.world * args.accumulate)
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                loss, parts = micro_step(model, codec, batch, counts, args)
            (loss / args.accumulate).backward()
            for k, v in parts.items():
                totals[k] = totals.get(k, 0) + v / args.accumulate
        norm = update(sum(totals.values()))
        log.bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            values = {k: (process.sum(v) / process.world).item() for k, v in sorted(totals.items())}
            values |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], **tally}
            log.write(done, values | {"seconds": time.perf_counter() - began, "wait": waited})
        if done % args.save_every == 0 or done == args.steps:
            log.write(done, validate(model, codec, held_out, mean, args, process))
            common.save_checkpoint(run, done, model, optimizer, meta | {"tally": tally}, tokenizer, process)
    log.close()
    if process.main:
        print(f"done: {run}")
    del model, optimizer, update  # before the process group goes (see common.teardown)


def count(module: nn.Module, trained: bool = False) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    check(args)
    process = common.setup(args.seed, args.replicas, args.cpu_bf16)
    train(args, process)
    common.teardown(process)


if __name__ == "__main__":
    common.run_main(main)
