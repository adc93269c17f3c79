# EncNet on NVIDIA GPUs, CUDA 13: the driver must be 580 or newer.
#
#   docker build -t encnet .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" encnet train
#
# Loader processes and NCCL pass data through /dev/shm, of which a container has 64 MiB: --shm-size
# gives more. Several GPUs: --entrypoint torchrun, then --nproc-per-node 8 -m encnet_triton.train.

FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS base
# Triton compiles its launcher on the user's machine and needs a C compiler and Python.h for that.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev python3 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/encnet/bin:$PATH

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/encnet
WORKDIR /sources
# torch brings CUDA's libraries, gigabytes: a layer of its own outlives changes of the sources.
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[plots]'

FROM base
COPY --from=build /opt/encnet /opt/encnet
# Any user may run it (--user): what is compiled at run time is cached below HOME.
ENV HOME=/tmp TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor
RUN useradd --uid 10001 --no-create-home encnet && install -d -o encnet /work
USER 10001
WORKDIR /work
ENTRYPOINT ["encnet"]
CMD ["--help"]
