# REPA-E with its packages, for NVIDIA GPUs (driver 580 or newer) and CPUs. See docs/installation.md.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and the Python headers: torch.compile builds its launchers with them
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# the base image has a user "ubuntu" with this uid
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 repae && install -d -o repae /app
USER 1000
WORKDIR /app

# the packages first: they change less often than the code, and this layer is kept
ENV VIRTUAL_ENV=/home/repae/env
ENV PATH=$VIRTUAL_ENV/bin:$PATH
COPY --chown=repae requirements.lock ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir --require-hashes -r requirements.lock

COPY --chown=repae . .
CMD ["bash"]
