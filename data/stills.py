"""Still scenes, with the names of what they show and where it is: for the sizes that start from random weights they
are what images of the web, captions and boxes are to the pretrained models of the full size (see `pretrain.py`).

    python -m data.stills --sheet docs/stills.png      # a picture of some, with their boxes

A scene is one of play's (`data.scenes`) in which nothing happens and no physics is run: bodies in random poses above
random things, seen by their cameras. As in play, only the FR3, the table, the light and the two places of the primary
camera are shared with the five tasks of franka.py; their objects, goals and placements are not.

Boxes are of what can be seen of a thing, found by drawing the scene once more with a colour for each thing. Every
number without a source is our choice."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import InputError
from data.families import Family
from data.scenes import GRASPABLE, HIGH, LOW, Crowded, Scene, Thing
from franka import Cameras, add_geom, pointing_down

PER_SCENE = 6  # stills: to build a scene takes longer than to draw it
SMALLEST = 12 / 96**2  # share of the image that must be seen of a thing for it to be named
NOUNS = (*GRASPABLE, "tray", "box", "basket", "plate", "platform", "gripper", "hand")
SHARES = {"fr3": 0.55, "sixaxis": 0.15, "gripper": 0.15, "hands": 0.15}  # of the scenes


@dataclass
class Still:
    """image: uint8 (H, H, 3). things: what is seen, and its box (top, left, bottom, right) in shares of the image.
    owner: int8 (H, H), the number of the thing that a pixel belongs to, or -1."""

    image: np.ndarray
    things: list[tuple[str, tuple[float, float, float, float]]]
    owner: np.ndarray


class Nothing(Family):
    """No behaviour: one to three things, up to two that stand fast, and bystanders as in any scene."""

    name = "nothing"

    def build(self, s: Scene) -> None:
        rng, self.standing = self.rng, {}
        for name in ("first", "second")[: rng.integers(0, 3)]:
            half, height = rng.uniform(0.04, 0.07), rng.uniform(0.02, 0.06)
            if rng.random() < 0.4:
                self.standing[name], _ = s.tray(name, ("tray", "box", "basket"), half, height)
                continue
            body, words, rgba, _, _ = s.fixed(name, ("plate", "platform"), 1.4 * half, turn=np.pi)
            if words.endswith("plate"):
                add_geom(body, "cylinder", (half, 0.003), (0, 0, 0.003), rgba)
            else:
                add_geom(body, "box", (half, rng.uniform(0.03, 0.07), height / 2), (0, 0, height / 2), rgba)
            self.standing[name] = words
        for _ in range(rng.integers(1, 4)):
            s.thing(GRASPABLE)


def stills(seed: int, number: int, size: int) -> list[Still]:
    """The PER_SCENE stills, of size x size pixels, of scene `number`: a function of the arguments."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 77, number]))
    body = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    while True:
        with contextlib.suppress(Crowded):
            scene = Scene(body, Nothing, rng)
            break
    cameras = ("primary",) if body == "hands" else ("primary", "wrist")
    eyes = _eyes_of(scene, cameras, size)
    words, owner = _owners(scene)
    made = []
    for _ in range(PER_SCENE // len(cameras)):
        _arrange(scene, rng)
        made += _look(scene, eyes, words, owner)
    return made


def _owners(scene: Scene) -> tuple[list[str], np.ndarray]:
    """What has a name in a scene, and for each geom of the model the number of the name that it belongs to, or -1."""
    names = {name: thing.words for name, thing in scene.things.items()} | scene.family.standing
    grips = {"left": "left hand", "right": "right hand"} if scene.body == "hands" else {"": "gripper"}
    model, owner = scene.model, []
    for body in model.geom_bodyid:
        name, root = model.body(body).name, model.body(model.body_rootid[body]).name
        if root in names:
            owner.append(list(names).index(root))
        elif name.endswith(("finger", "palm")):
            owner.append(len(names) + next(k for k, side in enumerate(grips) if name.startswith(side)))
        else:
            owner.append(-1)
    return [*names.values(), *grips.values()], np.array(owner)


def _arrange(scene: Scene, rng: np.random.Generator) -> None:
    """Puts the free things and the limbs elsewhere, at random: now and then the one right above the other."""
    model, qpos = scene.model, scene.data.qpos
    movable = scene.things.values()
    taken = [(at, r) for at, r in scene.taken if not any(at is t.at or np.array_equal(at, t.at) for t in movable)]
    address = lambda thing: model.jnt_qposadr[model.body(thing.name).jntadr[0]]
    for thing in movable:
        apart = lambda at, thing=thing: all(np.linalg.norm(at - o) > thing.radius + r + 0.01 for o, r in taken)
        spots = rng.uniform(LOW, HIGH, (20, 2))
        at, yaw = next(filter(apart, spots), spots[0]), rng.uniform(-np.pi, np.pi)
        taken.append((at, thing.radius))
        qpos[address(thing) :][:7] = (*at, thing.half, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
    for limb in scene.limbs.values():
        out = {"left": 0.14, "right": -0.14}[limb.side] if len(scene.limbs) > 1 else 0.0
        at = rng.uniform((0.33, -0.3, 0.0), (0.68, 0.3, 0.32)) + (0, out, 0)
        if rng.random() < 0.35 and scene.things:
            thing: Thing = scene.things[str(rng.choice(list(scene.things)))]
            off = (*rng.normal(0, 0.04, 2), 0.01 + rng.exponential(0.07))
            at = qpos[address(thing) :][:3] + off
        limb.start(at, pointing_down(rng.uniform(-1.2, 1.2)))
        limb.begin()
        if not limb.tips:
            qpos[limb.fingers] *= rng.uniform(0, 1)
    scene.mj.mj_kinematics(model, scene.data)
    scene.mj.mj_camlight(model, scene.data)


_eyes: dict[tuple[int, int], Cameras] = {}  # of this process: a GL context takes longer than a scene


def _eyes_of(scene: Scene, cameras: tuple[str, ...], size: int) -> Cameras:
    key = size, len(cameras)
    if key not in _eyes:
        _eyes[key] = Cameras(scene.model, cameras, size)
    _eyes[key].watch(scene.model, cameras)
    return _eyes[key]


def _look(scene: Scene, eyes: Cameras, words: list[str], owner: np.ndarray) -> list[Still]:
    """A still from each camera, of the scene as it is now."""
    flags, kinds = scene.mj.mjtRndFlag, scene.mj.mjtObj
    images = eyes.render(scene.data)
    eyes.scene.flags[flags.mjRND_SEGMENT] = eyes.scene.flags[flags.mjRND_IDCOLOR] = 1  # colours are numbers of geoms
    painted = eyes.render(scene.data)
    eyes.scene.flags[flags.mjRND_SEGMENT] = eyes.scene.flags[flags.mjRND_IDCOLOR] = 0
    drawn = eyes.scene.geoms[: eyes.scene.ngeom]
    numbers = np.array([-1, *(owner[g.objid] if g.objtype == kinds.mjOBJ_GEOM else -1 for g in drawn)])
    made = []
    for camera, image in images.items():
        seen, things = numbers[painted[camera].astype(np.int64) @ (1, 256, 65536)], []
        of_pixel = np.full(seen.shape, -1, np.int8)
        for k, name in enumerate(words):
            rows, columns = np.nonzero(seen == k)
            if len(rows) >= SMALLEST * seen.size:
                box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
                of_pixel[seen == k] = len(things)
                things.append((name, tuple(float(edge) / len(image) for edge in box)))
        made.append(Still(image, things, of_pixel))
    return made


def sheet(path: Path, seed: int = 0, size: int = 96, scale: int = 2, columns: int = 8, rows: int = 3) -> None:
    """Draws stills with the boxes of what they show."""
    from PIL import Image, ImageDraw

    page, each = Image.new("RGB", (columns * size * scale, rows * size * scale)), size * scale
    for k in range(columns * rows):
        still = stills(seed, k, size)[k % PER_SCENE]
        image = Image.fromarray(still.image).resize((each, each))
        draw = ImageDraw.Draw(image)
        for name, box in still.things:
            top, left, bottom, right = (edge * each for edge in box)
            draw.rectangle((left, top, right, bottom), outline="red")
            draw.text((left + 2, top - 11 if top > 11 else top), name, "black")
        page.paste(image, (k % columns * each, k // columns * each))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)
    print(f"wrote {path}")


@dataclass
class Args:
    sheet: str = "docs/stills.png"
    """The PNG to draw."""
    seed: int = 0
    """Seed of the scenes."""


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    if Path(args.sheet).suffix != ".png":
        raise InputError(f"--sheet {args.sheet}: give a file that ends in .png")
    sheet(Path(args.sheet), args.seed)


if __name__ == "__main__":
    common.run_main(main, resumes=False)
