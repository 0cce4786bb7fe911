"""franka.py: placements, physics conventions, predicates, experts, recorder, runner. CPU only, no download."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import common
import evaluate
import franka
from common import InputError
from data.lerobot import LeRobotReader
from franka import CLOSED, DOWN, HZ, OPEN, TASKS, Args, ChunkPolicy, ExpertPolicy, SimFranka, hold, reach

ROOT = Path(__file__).resolve().parent.parent
HOLD = np.array([0, 0, 0, 0, 0, 0, OPEN])


@pytest.fixture(scope="module")
def robots():
    """One robot a task, without rendering; building them once saves time."""
    made = {task: SimFranka(task, image_size=0) for task in TASKS}
    yield made
    for robot in made.values():
        robot.close()


def follow(robot: SimFranka, commands) -> tuple[bool | None, str]:
    """Executes a script of commands through Robot.step, until the task is decided or the script is over."""
    done, reason = None, ""
    for command in commands:
        move = common.relative_action(*robot.pose(), command.position, command.quaternion)
        robot.step(np.append(move, command.gripper))
        done, reason = robot.task.check(robot)
        if done is not None:
            break
    return done, reason


# ---- Placements ----


@pytest.mark.parametrize("task", TASKS)
def test_placements_depend_on_seed_task_and_trial_alone(robots, task):
    robot = robots[task]

    def layout(trial, seed):
        state = robot.reset(trial, seed).state
        return np.concatenate([robot.data.qpos, robot.model.body_pos.ravel(), state]), robot.instruction

    first, words = layout(3, 0)
    robot.step(HOLD)  # what a policy did before must not matter
    layout(4, 0)
    again, words_again = layout(3, 0)
    other = SimFranka(task, image_size=0, variation=True)  # nor the variation of light and distractors
    other.reset(3, 0)
    assert np.array_equal(first, again) and words == words_again == other.instruction
    assert np.array_equal(robot.where("hand")[0], other.where("hand")[0])
    assert not np.array_equal(first, layout(4, 0)[0])
    assert not np.array_equal(first, layout(3, 1)[0])


@pytest.mark.parametrize("task", TASKS)
def test_spawn_without_contact_and_the_task_unsolved(robots, task):
    robot = robots[task]
    for trial in range(6):
        robot.reset(trial, seed=5)
        assert all("table" in pair for pair in robot.contacts()), robot.contacts()
        assert robot.task.check(robot)[0] is None


def test_pick_cup_names_both_colours_and_places_both_cups(robots):
    robot, seen = robots["pick_cup"], set()
    for trial in range(12):
        robot.reset(trial)
        seen.add(robot.instruction)
        cups = [robot.where(c)[0] for c in ("red", "blue")]
        assert np.linalg.norm(cups[0] - cups[1]) > 0.12
        assert robot.task.target in robot.instruction
    assert seen == {"pick up the red cup", "pick up the blue cup"}


# ---- Conventions ----


def test_action_convention_golden(robots):
    robot = robots["pick_cup"]
    for axis in range(3):
        robot.reset(0)
        before = robot.pose()
        robot.step(np.eye(7)[axis] * 0.02 + HOLD)
        after = robot.pose()
        assert np.allclose(after[0] - before[0], np.eye(3)[axis] * 0.02, atol=2e-3)  # metres, base frame
        assert common.relative_action(*before, *after)[3:] == pytest.approx([0, 0, 0], abs=0.01)
    for axis, name in enumerate("xyz"):
        robot.reset(0)
        before = robot.pose()
        robot.step(np.eye(7)[3 + axis] * 0.1 + HOLD)
        turn = Rotation.from_quat(robot.pose()[1]) * Rotation.from_quat(before[1]).inv()
        assert np.allclose(turn.as_rotvec(), np.eye(3)[axis] * 0.1, atol=0.01), name  # the base's axes, not the tool's
        assert np.linalg.norm(robot.pose()[0] - before[0]) < 4e-3


def test_yaw_turns_counterclockwise_from_above(robots):
    robot = robots["pick_cup"]
    robot.reset(1)
    left, right = (robot.where(f"{side}_finger")[0] for side in ("left", "right"))
    angle = np.arctan2(*(left - right)[[1, 0]])
    for _ in range(3):
        robot.step(np.array([0, 0, 0, 0, 0, 0.1, OPEN]))
    left, right = (robot.where(f"{side}_finger")[0] for side in ("left", "right"))
    assert np.arctan2(*(left - right)[[1, 0]]) - angle == pytest.approx(0.3, abs=0.02)


def test_gripper_one_opens_and_state_has_the_named_columns(robots):
    robot = robots["pick_cup"]
    state = robot.reset(0).state
    assert state.shape == (len(common.ARM_STATE),) and state.dtype == np.float32
    assert state[7] > 0.97 and state[6] > 0.9  # open; pointing down, the quaternion is near (0, 0, 0, 1)
    for _ in range(8):
        state = robot.step(np.array([0, 0, 0, 0, 0, 0, CLOSED])).state
    assert state[7] < 0.03
    for _ in range(8):
        state = robot.step(HOLD).state
    assert state[7] > 0.97
    assert np.linalg.norm(state[3:7]) == pytest.approx(1, abs=1e-5)


def test_holding_still_does_not_drift(robots):
    robot = robots["pick_cup"]
    robot.reset(2)
    for _ in range(3):
        robot.step(HOLD + np.array([0.02, 0, 0, 0, 0, 0.1, 0]))
    for _ in range(3):
        before = robot.step(HOLD).state
    for _ in range(30):
        after = robot.step(HOLD).state
    assert np.abs(after - before).max() < 2e-3
    assert np.abs(robot.data.qvel[:7]).max() < 1e-2  # nor do the servos chatter


@pytest.mark.parametrize("bad", [[0] * 6, [np.nan] + [0] * 6, [np.inf] * 7])
def test_bad_actions_raise(robots, bad):
    robots["pick_cup"].reset(0)
    with pytest.raises(ValueError, match="7 finite numbers"):
        robots["pick_cup"].step(np.array(bad))


def test_wild_actions_keep_the_simulation_finite(robots):
    """An untrained policy commands anything; the joints' speed limit and the servo's torque limits bound what comes."""
    rng = np.random.default_rng(0)
    for task in ("pick_cup", "pot_oven"):
        robots[task].reset(0)
        for _ in range(60):
            before = robots[task].data.qpos[:7].copy()
            state = robots[task].step(rng.uniform(-1, 1, 7) * np.array([1, 1, 1, 3, 3, 3, 1])).state
            assert np.isfinite(state).all() and np.abs(robots[task].data.qpos[:7] - before).max() < 1.0
            robots[task].task.check(robots[task])


# ---- Experts and predicates ----


@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed(task):
    entries = franka.run_trials(ExpertPolicy(), task, 2)
    assert [e["success"] for e in entries] == [True, True], entries


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_experts_on_trials_not_used_for_tuning(task):
    assert sum(e["success"] for e in franka.run_trials(ExpertPolicy(), task, 10)) >= 9
    assert sum(e["success"] for e in franka.run_trials(ExpertPolicy(), task, range(10, 40))) >= 27


@pytest.mark.parametrize("task", ["pick_cup", "block_slot", "dip_brush", "pot_oven"])
def test_until_the_grasp_an_expert_that_begins_anew_does_the_same(robots, task):
    """What it does depends on what can be seen, not on how it came there: a policy without memory can follow it."""
    robot, rng = robots[task], np.random.default_rng(0)
    robot.reset(3, 2)
    going, far = ExpertPolicy(), 0
    going.reset(robot)
    for tick in range(60):
        action, anew = going.act(robot.observe(), ""), ExpertPolicy()
        if going.command.gripper == franka.CLOSED:
            break
        anew.reset(robot)
        np.testing.assert_allclose(anew.act(robot.observe(), ""), action, atol=1e-4)
        far += going.command.free
        push = np.append(rng.uniform(-0.02, 0.02, 3) * (going.command.free and tick % 4 == 0), np.zeros(4))
        robot.step(action + push)
    assert 3 < far < tick < 55


def test_a_descent_is_a_funnel():
    """High while it is beside, down where it is above, up again where it was pushed low and aside."""

    class Tool:
        def pose(self):
            return np.array(self.at), np.array(DOWN)

    def command(*at):
        tool = Tool()
        tool.at = at
        return next(franka.descend(tool, (0, 0, 0), DOWN, OPEN, ("far", "near"), 0.1, speed=0.5), None)

    far, beside, above, low = command(0.2, 0, 0.1), command(0.01, 0, 0.1), command(0, 0, 0.1), command(0.015, 0, 0.01)
    assert far.phase == "far" and far.free and abs(far.position[2] - 0.1) < 1e-9 and far.position[0] < 0.2
    assert beside.phase == "near" and not beside.free and 0.03 < beside.position[2] < 0.1 and beside.position[0] < 0.01
    assert above.position[2] < beside.position[2] and low.position[2] > 0.01
    assert command(0.001, 0, 0.002) is None


def test_fingers_move_until_they_stand(robots):
    robot = robots["pick_cup"]
    robot.reset(0, 0)
    openings = [robot.opening()]
    for gripper in (franka.CLOSED, franka.OPEN):
        for command in franka.move_fingers(robot, gripper, ""):
            robot.drive(command.position, command.quaternion, command.gripper)
            openings.append(robot.opening())
        assert abs(openings[-1] - gripper) < 0.05 and len(openings) < 16
    assert abs(openings[-1] - openings[-2]) < 0.01 < abs(openings[-2] - openings[-3])
    assert len(list(franka.move_fingers(robot, franka.OPEN, ""))) == 3  # open already


def test_the_brush_leaves_the_sauce_another_way(robots):
    """At no height is the way out like the way in: else in and out would cancel for a policy without memory."""
    robot = robots["dip_brush"]
    robot.reset(1, 2)
    expert, poses = ExpertPolicy(), {}
    expert.reset(robot)
    while (done := robot.task.check(robot)[0]) is None and robot.seconds < 16:
        robot.step(expert.act(robot.observe(), ""))
        poses.setdefault(expert.phase, []).append(robot.pose())
    assert done
    into, out = poses["dip the brush in the sauce"], poses["lift the brush out of the sauce"]
    turn = lambda a, b: (Rotation.from_quat(a[1]) * Rotation.from_quat(b[1]).inv()).magnitude()
    for pose in out[2:]:
        nearest = min(into, key=lambda p: np.linalg.norm(p[0] - pose[0]))
        assert np.linalg.norm(nearest[0] - pose[0]) + 0.1 * turn(nearest, pose) > 0.02


@pytest.mark.parametrize("task", TASKS)
def test_doing_nothing_fails_with_a_reason(task):
    class Lazy:
        name, phase = "lazy", ""

        def reset(self, robot):
            pass

        def act(self, observation, instruction):
            return HOLD

    entry = franka.run_trial(Lazy(), SimFranka(task, image_size=0), 0, 0)
    assert not entry["success"] and entry["reason"] and entry["seconds"] == TASKS[task].limit


def test_picking_the_wrong_cup_fails(robots):
    robot = robots["pick_cup"]
    robot.reset(0)
    wrong = robot.where(robot.task.other)[0]

    def script():
        yield from reach(robot, wrong + (0, 0, 0.13), DOWN, OPEN, "")
        yield from reach(robot, wrong + (0, 0, 0.01), DOWN, OPEN, "")
        yield from hold(robot, CLOSED, "", 6)
        yield from reach(robot, wrong + (0, 0, 0.16), DOWN, CLOSED, "")

    done, reason = follow(robot, script())
    assert done is False and reason == f"the {robot.task.other} cup was moved"


def test_a_block_held_over_or_left_beside_the_slot_is_no_success(robots):
    robot = robots["block_slot"]
    robot.reset(0)
    slot = robot.where("board")[0]
    robot.place("block", (*(slot[:2] + 0.1), robot.task.half[2]))
    done, reason = follow(robot, hold(robot, OPEN, "", 5))
    assert done is None and "beside the slot" in reason
    robot.place("block", (*slot[:2], 0.1))
    assert robot.task.check(robot)[0] is None  # over the slot, but high
    robot.place("block", (*slot[:2], robot.task.half[2] + 0.001), robot.where("board")[1].as_euler("xyz")[2])
    done, reason = follow(robot, hold(robot, CLOSED, "", 5))
    assert (done, reason) == (None, "the block was not released")
    assert follow(robot, hold(robot, OPEN, "", 5))[0] is True


def test_a_door_left_ajar_is_no_success(robots):
    robot = robots["close_oven"]
    robot.reset(0)
    robot.data.joint("door").qpos[0] = 0.1
    done, reason = follow(robot, hold(robot, CLOSED, "", 5))
    assert done is None and "0.1" in reason and "rad open" in reason  # and it does not fall shut, or open
    assert robot.data.joint("door").qpos[0] == pytest.approx(0.1, abs=0.01)


def test_a_brush_that_touches_no_sauce_is_no_success(robots):
    robot = robots["dip_brush"]
    robot.reset(0)
    grasp = robot.where("brush")[0] + robot.where("brush")[1].apply([robot.task.grip, 0, 0.003])
    facing = franka.pointing_down(robot.where("brush")[1].as_euler("xyz")[2])

    def script():
        yield from reach(robot, grasp + (0, 0, 0.1), facing, OPEN, "")
        yield from reach(robot, grasp, facing, OPEN, "")
        yield from hold(robot, CLOSED, "", 5)
        yield from reach(robot, grasp + (0, 0, 0.15), facing, CLOSED, "")

    done, reason = follow(robot, script())
    assert robot.held("brush") and robot.task.tip_of(robot)[2] > 0.07
    assert done is None and reason == "the brush's tip was not in the sauce"


def test_pot_oven_fails_when_the_hand_hits_the_oven(robots):
    robot = robots["pot_oven"]
    robot.reset(0)
    oven, turned = robot.where("oven")

    def ram():  # down onto the oven's roof, then away again
        above = oven + turned.apply([0.03, 0, 0.3])
        yield from reach(robot, above, DOWN, CLOSED, "")
        yield from reach(robot, above - (0, 0, 0.13), DOWN, CLOSED, "", ticks=12)

    assert follow(robot, ram()) == (False, "the robot touched the oven")


def test_pot_oven_fails_when_the_pot_is_in_place_but_the_hand_hit_the_oven_on_the_way(robots):
    """A predicate on the final state alone would call this a success."""
    robot = robots["pot_oven"]
    robot.reset(0)

    for command in robot.task.expert(robot):
        move = common.relative_action(*robot.pose(), command.position, command.quaternion)
        robot.step(np.append(move, command.gripper))
        if command.phase == "open the gripper":
            break
    robot.drive(*robot.pose(), OPEN)
    assert robot.task.check(robot)[0] is None  # in place, not yet released for long enough
    here, tool = robot.pose()
    turned = robot.where("oven")[1]
    # Sideways out of the handle's way is the oven's wall: up a little, then forward into the frame.
    for offset in ((0, 0, 0.12), (0.1, 0, 0.12), (0.1, 0, 0.06)):
        for command in reach(robot, here + turned.apply(offset), tool, OPEN, "", ticks=12):
            robot.drive(command.position, command.quaternion, command.gripper)
    x, y, z = robot.task.in_oven(robot, "pot")
    assert robot.task.radius < x < robot.task.inside[0] and z < 0.05  # the final state is as it should be
    assert robot.task.check(robot) == (False, "the robot touched the oven")


# ---- Recorder ----


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Two demonstrations of each task, recorded through the command's own function with two worker processes."""
    out = tmp_path_factory.mktemp("record") / "demos"
    franka.record(Args(task="all", record=2, image_size=64, out=str(out), workers=2))
    return LeRobotReader(out)


def test_recording_reads_back(demos):
    assert demos.num_episodes == 2 * len(TASKS) and demos.fps == HZ and set(demos.cameras) == {"primary", "wrist"}
    assert demos.task_names == 2 * list(TASKS)
    texts = [demos.episode(i)["task"] for i in range(demos.num_episodes)]
    assert "cup" in texts[0] and "cup" in texts[5] and texts[1:5] == [t.instruction for t in list(TASKS.values())[1:]]
    for i in range(demos.num_episodes):
        episode = demos.episode(i)
        assert set(common.gather(episode["action"], ["right_gripper"], common.ACTION_NAMES).ravel()) <= {0.0, 1.0}
        assert np.array_equal(episode["action_mask"], np.isin(common.ACTION_NAMES, common.ARM_ACTION))
    cup = demos.episode(0)
    colour = "red" if "red" in cup["task"] else "blue"
    assert f"close the gripper around the {colour} cup" in cup["subtask"]
    picture = demos.frames(0, "primary", [0])
    assert picture.shape == (1, 64, 64, 3) and picture.std() > 15


def test_recorded_actions_integrate_to_the_recorded_states(demos):
    """Where nothing disturbed the robot, state[t] moved by action[t] is state[t+1]."""
    errors = []
    for i in range(demos.num_episodes):
        episode = demos.episode(i)
        state = common.gather(episode["state"], common.ARM_STATE, common.STATE_NAMES)
        action = common.gather(episode["action"], common.ARM_ACTION, common.ACTION_NAMES)
        position, _ = common.apply_action(state[:-1, :3], state[:-1, 3:7], action[:-1, :6])
        errors.append(np.linalg.norm(position - state[1:, :3], axis=1))
    errors = np.concatenate(errors)
    assert np.median(errors) < 1e-3
    assert np.mean(errors < 5e-3) > 0.85  # the rest: disturbances, and the push against the door


def test_recording_does_not_depend_on_workers_or_number_and_resumes(demos, tmp_path, capsys, monkeypatch):
    args = Args(task="all", record=1, image_size=64, out=str(tmp_path / "d"), workers=1)
    franka.record(args)
    with pytest.raises(InputError, match="--resume"):
        franka.record(args)
    franka.record(Args(task="all", record=2, image_size=64, out=str(tmp_path / "d"), workers=1, resume=True))
    again = LeRobotReader(tmp_path / "d")
    assert again.num_episodes == demos.num_episodes
    for i in range(demos.num_episodes):
        a, b = demos.episode(i), again.episode(i)
        assert np.array_equal(a["action"], b["action"]) and np.array_equal(a["state"], b["state"])
        assert (a["task"], a["subtask"]) == (b["task"], b["subtask"])
    assert "failed and were left out" in capsys.readouterr().out
    args = Args(task="all", record=3, image_size=64, out=str(tmp_path / "d"), workers=1, resume=True)
    kept = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()}
    for other in ({"seed": 3}, {"disturb": 4}, {"tilt": 1}, {"look": "mesh"}, {"variation": True}):
        with pytest.raises(InputError, match="was recorded with {.*'seed': 1, 'disturb': 1.0, .*choose another --out"):
            franka.record(replace(args, **other))
    assert json.loads((tmp_path / "d/meta/record.json").read_text())["experts"] == franka.EXPERTS
    demos_now = franka.INSTRUCTIONS | {"close_oven": "shut it"}
    with monkeypatch.context() as patch, pytest.raises(InputError, match="was recorded with .*choose another --out"):
        patch.setattr(franka, "INSTRUCTIONS", demos_now)
        franka.record(args)
    (tmp_path / "d/meta/record.json").unlink()  # as of an earlier commit
    for other in ({"task": "pot_oven", "record": 11}, {"disturb": 4}):
        with pytest.raises(InputError, match="another --task, --seed, --disturb or --tilt"):
            franka.record(replace(args, **other))
    kept.pop(tmp_path / "d/meta/record.json")
    assert kept == {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()}


def test_the_strength_of_disturbances():
    """Chance and size of a push grow as they are said to; where the tool is not free, there is none."""
    for strength, tilt in ((0, 1), (1, 0), (2.5, 2)):
        disturbance = franka.Disturbance(np.random.default_rng(0), strength, tilt)
        pushes = np.stack([disturbance.push(True) for _ in range(20_000)])
        share, chance = pushes.any(1).mean(), 0.05 * strength**2
        assert share == pytest.approx(3 * chance / (1 + 2 * chance), rel=0.1)  # of 3 ticks each, in the mean
        tilts = (strength > 0) * tilt * 0.05
        limit = np.array([*3 * [0.01 * strength], tilts, tilts, 0.05 * strength])
        assert (abs(pushes) <= limit).all() and (abs(pushes).max(0) >= 0.95 * limit).all()
        assert not any(disturbance.push(False).any() for _ in range(200))


def test_disturbances_are_corrected_by_the_recorded_action():
    """Some recorded actions differ from what was executed, and the next ones lead back: the episode succeeds."""
    robot = SimFranka("pick_cup", image_size=0)
    pushed = {}
    for strength in (0, 1, 3):
        away = []
        for trial in range(4):
            episode, reason = franka.demonstrate(robot, trial, 1, strength)
            assert episode is not None, reason
            state, action = episode["state"], episode["action"]
            position, _ = common.apply_action(state[:-1, :3], state[:-1, 3:7], action[:-1, :6])
            away.append(np.linalg.norm(position - state[1:, :3], axis=1))
            assert len(action) < 40  # and the expert never stalls
        pushed[strength] = np.concatenate(away)
    assert (pushed[0] < 4e-3).all() and pushed[1].max() > 4e-3 and pushed[3].max() > 2e-2


def test_demonstrations_never_use_the_evaluation_seed(tmp_path):
    with pytest.raises(InputError, match="even seeds belong to the evaluation"):
        franka.record(Args(record=1, seed=0, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


# ---- Rendering ----


def test_pictures(robots):
    robot = SimFranka("pick_cup", image_size=64)
    seen = robot.reset(0).images
    assert set(seen) == {"primary", "wrist"}
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in seen.values())
    image = seen["primary"].astype(int)
    red = (image[..., 0] > 100) & (image[..., 1] < 60) & (image[..., 2] < 60)
    blue = (image[..., 2] > 100) & (image[..., 0] < 60) & (image[..., 1] < 90)
    for mask in (red, blue):  # both cups are in view, and wide enough to be found
        rows, columns = np.nonzero(mask)
        assert np.ptp(columns) + 1 >= 6 and np.ptp(rows) + 1 >= 8
    top = image[:32].std()  # the right way up: the arm is in the upper half, the lower half is mostly table
    assert top > image[48:].std()
    assert np.array_equal(robot.reset(0).images["primary"], seen["primary"])
    robot.close()
    varied = SimFranka("pick_cup", image_size=64, variation=True)
    assert np.abs(varied.reset(0).images["primary"].astype(int) - image).mean() > 2
    varied.close()


def test_the_look_changes_pictures_only():
    ends = []
    for look in ("capsule", "mesh"):
        robot = SimFranka("pick_cup", image_size=0, look=look)
        robot.reset(3)
        follow(robot, robot.task.expert(robot))
        ends.append(robot.data.qpos.copy())
    assert np.array_equal(*ends)


def test_no_gl_library_is_one_message(monkeypatch):
    real = franka.importlib.import_module

    def absent(name, *rest):
        if name.startswith("mujoco."):
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
        return real(name, *rest)

    monkeypatch.setattr(franka.importlib, "import_module", absent)
    with pytest.raises(InputError, match="apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1"):
        SimFranka("pick_cup", image_size=64)
    SimFranka("pick_cup", image_size=0).close()  # without pictures no GL is needed


# ---- Runner ----


def test_runner_writes_results_and_video_and_resumes(tmp_path, monkeypatch, capsys):
    command = ["franka.py", "--tiny", "--policy", "expert", "--task", "close_oven", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    franka.main()
    path = tmp_path / "run/close_oven/results.json"
    entries = json.loads(path.read_text())
    assert [e["trial"] for e in entries] == [0, 1]
    about = {"task", "trial", "instruction", "success", "seconds", "reason"}  # and what all trials there have in common
    assert set(entries[0]) == about | {"policy", "seed", "limit", "image_size", "look", "variation", "execute"}
    assert entries[0]["policy"] == "expert" and entries[0]["seed"] == 0 and entries[0]["success"] is True
    low, high = common.wilson(2, 2)
    assert f"2/2 successful (95 % interval {low:.0%} to {high:.0%})" in capsys.readouterr().out
    with av.open(str(tmp_path / "run/close_oven/video.mp4")) as video:
        frames = [f for f in video.decode(video=0)]
    assert len(frames) == round(sum(e["seconds"] for e in entries) * HZ) + 2 * HZ
    assert (frames[0].width, frames[0].height) == (640, 364)
    with pytest.raises(InputError, match="--resume"):
        franka.main()
    assert json.loads(path.read_text()) == entries  # nothing overwritten
    monkeypatch.setattr(sys, "argv", [*command, "--resume", "--trials", "3"])
    franka.main()
    again = json.loads(path.read_text())
    assert again[:2] == entries and again[2]["trial"] == 2
    common.write_json(path, [{k: v for k, v in e.items() if k != "limit"} for e in again])  # as of an earlier commit
    franka.main()
    common.write_json(path, again)
    for other in ("--seed 3", "--seconds 5", "--image-size 96", "--look mesh", "--variation"):
        monkeypatch.setattr(sys, "argv", [*command, "--resume", "--trials", "4", *other.split()])
        with pytest.raises(InputError, match="choose another --out"):
            franka.main()
    assert json.loads(path.read_text()) == again


class FakePolicy:
    """Stands in for finetune.Policy: always moves up, gripper closed with probability 0.6."""

    cameras, chunk, execute, hz = ("primary", "wrist"), 8, 4, 10
    pictures = {"primary": [[64, 64]], "wrist": [[64, 64]]}
    action_names, state_names = common.ARM_ACTION, common.ARM_STATE

    def __init__(self):
        self.calls = []

    def act(self, images, state, instruction):
        assert images["primary"].shape == (1, 64, 64, 3) and state.shape == (1, 46) and state.dtype == np.float32
        assert isinstance(instruction, list)
        self.calls.append(common.gather(state[0], common.ARM_STATE, common.STATE_NAMES))
        row = common.scatter(np.array([0, 0, 0.01, 0, 0, 0, 0.4], np.float32), common.ARM_ACTION, common.ACTION_NAMES)
        return np.tile(row, (1, 8, 1))


def test_a_chunk_policy_executes_part_of_each_chunk():
    fake = FakePolicy()
    frames, seen = [], []
    entries = franka.run_trials(
        ChunkPolicy(fake, "fake"), "pick_cup", [5], seconds=1.2, image_size=64, film=frames.append, report=seen.append
    )
    assert entries == seen and not entries[0]["success"] and entries[0]["seconds"] == 1.2 and entries[0]["trial"] == 5
    assert len(fake.calls) == 3  # 12 ticks, 4 of every chunk
    assert np.allclose(fake.calls[1][:3] - fake.calls[0][:3], [0, 0, 0.04], atol=3e-3)
    assert fake.calls[2][7] < 0.1 < 0.9 < fake.calls[0][7]  # 0.4 is below the threshold: closed
    assert len(frames) == 12 + HZ and frames[0].dtype == np.uint8


def test_a_chunk_is_executed_in_order():
    """Row by row, `execute` of them, then anew; and cameras that the robot has not are named."""
    fake = FakePolicy()
    rows = np.arange(8, dtype=np.float32)[:, None] / 10 + np.zeros(44, np.float32)
    fake.act = lambda images, state, instruction: rows[None]
    policy = ChunkPolicy(fake, "fake")
    policy.reset(None)
    images = {camera: np.zeros((64, 64, 3), np.uint8) for camera in fake.cameras}
    seen = franka.Observation(images, np.zeros(8, np.float32))
    actions = np.stack([policy.act(seen, "go") for _ in range(8)])
    np.testing.assert_allclose(actions[:, 0], [0, 0.1, 0.2, 0.3] * 2, atol=1e-6)
    often = ChunkPolicy(fake, "fake", execute=1)
    often.reset(None)
    assert all(often.act(seen, "go")[0] == 0 for _ in range(3))
    with pytest.raises(InputError, match="--execute 9: fake predicts 8 actions"):
        ChunkPolicy(fake, "fake", execute=9)
    policy.reset(None)
    with pytest.raises(InputError, match=r"fake wants cameras \['wrist'\]; the robot has \['primary'\]"):
        policy.act(franka.Observation({"primary": images["primary"]}, seen.state), "go")


def test_a_policy_gets_pictures_as_large_as_it_learned_from(tmp_path, monkeypatch, capsys):
    """By itself, in both runners (FakePolicy asserts it); another size is one line that names both."""
    policy = ChunkPolicy(FakePolicy(), "fake")
    monkeypatch.setattr(franka, "make_policy", lambda path, execute=0: policy)
    args = Args(trials=1, seconds=0.2, out=str(tmp_path))
    franka.evaluate(args)
    evaluate.report_sim(evaluate.Args(tasks=("pick_cup",), trials=1, seconds=0.2))
    assert len(policy.policy.calls) == 2
    assert franka.picture_size(policy, 64) == 64 and "warning" not in capsys.readouterr().out
    assert franka.picture_size(policy, 96) == 96
    assert "fake learned from pictures of 64 x 64 pixels, and gets 96 x 96" in capsys.readouterr().out
    policy.policy.pictures = {"primary": [[180, 320], [96, 96]]}  # two data sets of a real robot
    assert franka.picture_size(policy, 0) == 320 and "96 x 96, 180 x 320 pixels" in capsys.readouterr().out
    assert franka.picture_size(ExpertPolicy(), 0) == 128 and franka.picture_size(ExpertPolicy(), 0, 64) == 64
    assert (Args.record_size, franka.TINY.record_size, franka.SMALL.record_size) == (128, 64, 96)


def test_execute_reaches_the_trials_and_is_kept_with_them(tmp_path, monkeypatch):
    fake = FakePolicy()
    monkeypatch.setattr(franka, "make_policy", lambda path, execute=0: ChunkPolicy(fake, "fake", execute))
    args = Args(trials=1, seconds=0.4, out=str(tmp_path), execute=2)
    franka.evaluate(args)
    assert len(fake.calls) == 2  # 4 ticks
    entries = json.loads((tmp_path / "pick_cup/results.json").read_text())
    assert [e["execute"] for e in entries] == [2]
    for other in (0, 1):
        with pytest.raises(InputError, match="'execute': 2.*choose another --out"):
            franka.evaluate(replace(args, execute=other, trials=2, resume=True))


def test_policies_of_other_robots_are_refused(tmp_path, monkeypatch):
    """Of another rate, without some of this arm's actions (they would be zeros), or reading what it has not."""
    import finetune

    common.write_json(tmp_path / "meta.json", {"stage": "finetune", "step": 1, "time": 0})
    fake = FakePolicy()
    monkeypatch.setattr(finetune, "load_policy", lambda path: fake)
    assert franka.make_policy(str(tmp_path)).policy is fake
    for changes, message in (
        ({"hz": 5}, "was trained at 5 Hz, the robot runs at 10: train with --hz 10"),
        ({"action_names": common.ARM_ACTION[:6]}, r"gives no \['right_gripper'\]"),
        ({"state_names": common.STATE_NAMES[:16]}, r"reads \['left_x', .* this robot of one arm has not"),
    ):
        vars(fake).update(changes)
        with pytest.raises(InputError, match=message):
            franka.make_policy(str(tmp_path))
        vars(fake).clear()


def test_paired_across_policies():
    class Start:
        phase = ""

        def __init__(self, name):
            self.name, self.first = name, []

        def reset(self, robot):
            self.first.append(robot.data.qpos.copy())

        def act(self, observation, instruction):
            return HOLD if self.name == "still" else HOLD + np.array([0.02, 0.01, -0.02, 0, 0, 0.1, -1])

    policies = Start("still"), Start("moving")
    for policy in policies:
        franka.run_trials(policy, "block_slot", 3, seconds=0.5, image_size=0)
    assert np.array_equal(policies[0].first, policies[1].first)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "make_coffee"], "unknown task 'make_coffee': choose one of pick_cup, block_slot"),
        (["--task", "all"], "unknown task 'all'"),
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["--first-trial", "-1"], "--first-trial -1: must be at least 0"),
        (["--seconds", "nan"], "--seconds nan: must be at least 0"),
        (["--image-size", "4"], "--image-size 4"),
        (["--workers", "0"], "--workers 0"),
        (["--record", "2", "--seed", "2"], "even seeds belong to the evaluation"),
        (["--policy", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["franka.py", *flags])
    with pytest.raises(SystemExit) as exit:
        common.run_main(franka.main)
    text = capsys.readouterr().err
    assert exit.value.code == 2 and message in text and text.count("\n") == 1 and not list(tmp_path.rglob("*.json"))


def test_with_no_policy_the_expert_runs_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(franka, "SHIPPED", tmp_path / "policies/small")
    assert isinstance(franka.make_policy(""), ExpertPolicy)
    assert "the scripted expert shows the task" in capsys.readouterr().out


def test_which_policy_shows_the_task(monkeypatch, tmp_path):
    """That of a run of one's own, then the one that ships."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(franka, "SHIPPED", tmp_path / "policies/small")
    asked = []
    monkeypatch.setattr(common, "find_checkpoint", lambda path, stage: asked.append(Path(path)) or sys.exit(0))
    for made, expected in (
        ("policies/small/meta.json", "policies/small"),
        ("runs/small/finetune/checkpoints/step_00000001/meta.json", "runs/small/finetune"),
    ):
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).write_text("{}")
        with pytest.raises(SystemExit):
            franka.make_policy("")
        assert asked[-1].absolute() == tmp_path / expected


def test_the_policy_that_ships_goes_where_it_is_told():
    """25 MB at most. Of two cups it goes towards the one that is named, which one word of the instruction decides."""
    assert sum(path.stat().st_size for path in franka.SHIPPED.iterdir()) < 25e6
    policy, robot = franka.make_policy(str(franka.SHIPPED), execute=16), SimFranka("pick_cup", 96)
    leads = []
    for trial in range(4):
        observation = robot.reset(trial)
        red, blue = (robot.where(name)[0][:2] for name in ("red", "blue"))
        ways = []
        for colour in ("red", "blue"):
            policy.reset(robot)
            first = policy.act(observation, f"pick up the {colour} cup")
            ways.append(np.sum([action[:2] for action in (first, *policy.queue)], 0))
        leads.append((ways[0] - ways[1]) @ (red - blue) / np.linalg.norm(red - blue))
    robot.close()
    assert np.mean(leads) > 0.02  # m


def test_import_does_nothing():
    code = "import os, sys; env = dict(os.environ); import franka; assert env == dict(os.environ); "
    code += "assert 'mujoco' not in sys.modules and 'finetune' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
