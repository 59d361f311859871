# bvpo in a container: the same make targets as on a machine.
#   docker build -t bvpo .                                     CPU
#   docker build -t bvpo --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   CUDA
#   docker run --rm -v "$PWD/experiments:/bvpo/experiments" bvpo                             make vignette
#   docker run --rm bvpo make test
FROM python:3.12-slim
# pip takes torch from this index first; the CPU build of the pinned version by default
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /bvpo
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY bvpo/__init__.py bvpo/
RUN PIP_EXTRA_INDEX_URL=${TORCH_INDEX} make build
COPY . .
CMD ["make", "vignette"]
