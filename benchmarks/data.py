"""How fast data are converted and read: frames a second of one core.

    python benchmarks/data.py                    about a minute of one core
    python benchmarks/data.py --episodes 4       a quick look

Conversion: `python -m data.rlds` on a synthetic BridgeData V2 file with JPEG pictures of --pixels, to h264; its start
is not counted. Training reads: windows of 16 frames, drawn at random as in training (`data.windows`), with their
actions, states and texts, at 224 px; from files of 224 px and from files of --pixels, which are scaled. Beside them
stands plain sequential decoding to RGB, in order, each frame once: the limit. A random window starts between key
frames, so it decodes frames that it does not use.

Codecs: h264 as `LeRobotWriter` writes it (a key frame every 8 frames), AV1 as the `lerobot` package does (every
2). Seconds are CPU seconds of all threads, so other programs on the machine hardly matter.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import av
import numpy as np
import torch
from PIL import Image

import common
from data.lerobot import LeRobotReader, LeRobotWriter
from data.rlds import masked_crc32c
from data.windows import View, Windows

FRAMES, SIZE, STEPS = 16, 224, 100  # of a window; its pixels; steps of an episode


@dataclass
class Args:
    episodes: int = 12
    """Episodes of 100 steps to convert and to read (our choice)."""
    pixels: int = 256
    """Height and width of the stored pictures, in pixels (our choice)."""
    windows: int = 150
    """Random windows to read (our choice)."""


def clip(seed: int, pixels: int) -> np.ndarray:
    """A textured background that drifts, discs that move, and sensor noise: uint8 (STEPS, pixels, pixels, 3)."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 255, (pixels // 8, pixels // 8, 3)).astype(np.uint8)
    back = np.asarray(Image.fromarray(rough).resize((pixels + STEPS, pixels + STEPS), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:pixels, :pixels]
    grain = rng.normal(size=(8, pixels, pixels, 1)) * 2
    out = np.empty((STEPS, pixels, pixels, 3), np.uint8)
    for t in range(STEPS):
        image = back[t // 4 : t // 4 + pixels, :pixels] + grain[t % 8]
        for k in range(3):
            cx, cy = pixels * (0.5 + 0.3 * np.sin(t / 15 + k)), pixels * (0.5 + 0.3 * np.cos(t / 20 + 2 * k))
            image[(x - cx) ** 2 + (y - cy) ** 2 < (pixels / 10) ** 2] = (50 + 60 * k, 200 - 50 * k, 90)
        out[t] = image.clip(0, 255)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Conversion
# --------------------------------------------------------------------------------------------------------------------


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def write_rlds(root: Path, args: Args) -> None:
    """A data set by the schema of BridgeData V2, with as many episodes as asked for."""
    tensor = lambda *shape: {"tensor": {"shape": {"dimensions": [str(d) for d in shape]}, "dtype": "float32"}}
    image = {"image": {"shape": {"dimensions": [str(args.pixels)] * 2 + ["3"]}, "encodingFormat": "jpeg"}}
    group = lambda **features: {"featuresDict": {"features": features}}
    steps = group(action=tensor(7), is_first=tensor(), language_instruction={"text": {}},
                  observation=group(state=tensor(7), image_0=image))  # fmt: skip
    root.mkdir(parents=True)
    (root / "features.json").write_text(json.dumps(group(steps={"sequence": {"feature": steps}})))
    split = {"name": "train", "shardLengths": [str(args.episodes)]}
    (root / "dataset_info.json").write_text(json.dumps({"name": "bridge_dataset", "splits": [split]}))
    with (root / "bridge_dataset-train.tfrecord-00000-of-00001").open("wb") as file:
        for seed in range(args.episodes):
            rng, entries = np.random.default_rng(seed), b""
            for name, width in (("action", 7), ("observation/state", 7)):
                values = rng.uniform(0, 0.02, (STEPS, width)).astype("<f4")
                entries += entry(name, 2, field(1, values.tobytes()))
            jpegs = b""
            for picture in clip(seed, args.pixels):
                Image.fromarray(picture).save(data := io.BytesIO(), "jpeg", quality=90)
                jpegs += field(1, data.getvalue())
            entries += entry("observation/image_0", 1, jpegs)
            entries += entry("language_instruction", 1, field(1, b"stir the pot") * STEPS)
            entries += entry("is_first", 3, field(1, bytes([1] + [0] * (STEPS - 1))))
            record = field(1, entries)
            for part in (struct.pack("<Q", len(record)), record):
                file.write(part + struct.pack("<I", masked_crc32c(part)))


def entry(name: str, kind: int, values: bytes) -> bytes:
    """An entry of tf.train.Example's map: kind 1 for bytes, 2 for floats, 3 for integers."""
    return field(1, field(1, f"steps/{name}".encode()) + field(2, field(kind, values)))


def converted(source: Path, out: Path, limit: int) -> tuple[int, float]:
    """Frames written and CPU seconds taken by a conversion of the first `limit` episodes."""
    command = [sys.executable, "-m", "data.rlds", str(source), "--out", str(out), "--limit", str(limit)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).resolve().parent.parent,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return int(LeRobotReader(out).lengths.sum()), seconds


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def write_lerobot(root: Path, args: Args, pixels: int, codec: str) -> Path:
    """A LeRobot data set whose pictures are h264 or av1."""
    os.environ.setdefault("SVT_LOG", "1")  # errors alone: the AV1 encoder talks to stderr by itself
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, cameras={"primary": (pixels, pixels)}) as writer:
        for seed in range(args.episodes):
            action, state = rng.uniform(0, 0.02, (STEPS, 7)), np.tile([0.4, 0, 0.3, 0, 0, 0, 1, 1], (STEPS, 1))
            writer.add_episode({"primary": clip(seed, pixels)}, action, state, "stir the pot")
    for path in root.rglob("*.mp4") if codec == "av1" else ():
        frames = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libsvtav1", rate=10, options={"g": "2", "crf": "30", "preset": "10"})
            stream.width = stream.height = pixels
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
    return root


def sequential(root: Path) -> float:
    """Frames a CPU second of plain decoding to RGB, one thread."""
    count, convert, begun = 0, av.video.reformatter.VideoReformatter(), time.process_time()
    for path in root.rglob("*.mp4"):
        with av.open(str(path)) as file:
            file.streams.video[0].codec_context.thread_count = 1
            for frame in file.decode(video=0):
                convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
                count += 1
    return count / (time.process_time() - begun)


def windows_read(root: Path, args: Args) -> float:
    """Windows a CPU second, as the training stream draws them."""
    windows = Windows([root], {"video": View("primary", FRAMES, SIZE)}, FRAMES - 1, 10, 0)
    windows[0]  # opens the file
    begun = time.process_time()
    for i in range(1, args.windows + 1):
        windows[i]
    return args.windows / (time.process_time() - begun)


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, episodes=2, pixels=32, windows=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rlds(root / "rlds", args)
        first = converted(root / "rlds", root / "one", 1)
        frames, seconds = (a - b for a, b in zip(converted(root / "rlds", root / "all", 0), first, strict=True))
        print(f"conversion, RLDS with JPEG to LeRobot with h264, one camera of {args.pixels} px: {frames / seconds:.0f}"
              f" frames and {(args.episodes - 1) / seconds:.1f} episodes of {STEPS} steps a second")  # fmt: skip
        print(f"\ntraining reads: random windows of {FRAMES} frames at {SIZE} px, a second of one core")
        print(f"{'stored as':>14s} {'windows':>9s} {'their frames':>13s} {'sequential':>11s} {'share':>6s}")
        for codec in ("h264", "av1"):
            for pixels in dict.fromkeys((SIZE, args.pixels)):
                source = write_lerobot(root / f"{codec}{pixels}", args, pixels, codec)
                limit, rate = sequential(source), windows_read(source, args)
                print(f"{codec:>6s} {pixels:4d} px {rate:9.1f} {rate * FRAMES:13.0f} {limit:11.0f} "
                      f"{rate * FRAMES / limit:6.0%}", flush=True)  # fmt: skip
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    common.run_main(main, resumes=False)
