# make demo   the five stages end to end on a CPU: report.png and a video in runs/tiny (about 10 minutes on 2 cores)
# make test   the test suite (under 20 minutes on 2 cores)
# make lint   ruff
# make reproduce  all that results/ holds, at --small; type it again to go on (ARGS=--list: what is left)
# make results    tables and figures from results/

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export MUJOCO_GL ?= egl
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint slow data clean env reproduce results

env: $(VENV)/.installed gl

# torch first and alone: a package that asks for plain torch would otherwise pull another build.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# Headless rendering needs a GL library of the system: installed where that is allowed, named where it is not.
gl:
	@if ldconfig -p | grep -q libEGL.so.1 || ldconfig -p | grep -q libOSMesa; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing the GL libraries for headless rendering"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 >/dev/null; \
	else \
		echo "error: no GL library for headless rendering; ask an administrator for:"; \
		echo "  apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libgl1"; exit 2; \
	fi

demo: env
	$(PY) lam.py --tiny --resume
	$(PY) distill.py --tiny --resume
	$(PY) finetune.py --tiny --resume
	$(PY) evaluate.py --tiny
	$(PY) franka.py --tiny --resume --task pick_cup --policy runs/tiny/finetune
	@echo "look at runs/tiny/report.png and runs/tiny/franka/pick_cup/video.mp4"

test: env
	$(PY) -m pytest

slow: env
	$(PY) -m pytest -m slow

lint: env
	$(PY) -m ruff check .

reproduce: env
	$(PY) reproduce.py --small $(ARGS)

results: env
	$(PY) report.py --small

# Makes data/tiny anew: 15 demonstrations of each of the five tasks, two cameras.
data: env
	rm -rf runs/data/tiny
	$(PY) franka.py --tiny --record 15 --task all --out runs/data/tiny
	rm -rf data/tiny && mv runs/data/tiny data/tiny

clean:
	rm -rf runs
