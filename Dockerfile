# The image, on NVIDIA's PyTorch for GPUs or on a slim Python for CPUs, by the same steps:
#   docker build -t megatron-moe .
#   docker build -t megatron-moe:cpu --build-arg BASE_IMAGE=python:3.12-slim-bookworm .
# docs/containers.md says what each argument does, what is in the image and how it is tested.

ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3

FROM ${BASE_IMAGE} AS build

# Installed only if the base has no torch. TORCH_FLAGS are for pip: an --index-url of CPU builds.
ARG TORCH=torch==2.13.0
ARG TORCH_FLAGS=
# If empty, the tested one for the base's Python: 0.19.2, or 0.16.1 before Python 3.12.
ARG MEGATRON_CORE=
# Extras of pyproject.toml.
ARG EXTRAS=hf,wandb

ENV PATH=/opt/venv/bin:${PATH}
# The environment sees the base's packages; pip is the base's, and the image gets no second one.
RUN python3 -m venv --system-site-packages --without-pip /opt/venv
WORKDIR /build

# A private index comes as the secret pip.conf, which is there for the step alone.
COPY docker/requirements.py docker/requirements.py
# hadolint ignore=DL3013,SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python docker/requirements.py pins > pins.txt \
    && if ! grep -q '^torch==' pins.txt; then \
        python -m pip install ${TORCH_FLAGS} "${TORCH}" \
        && python docker/requirements.py pins > pins.txt; \
    fi

COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python docker/requirements.py wanted "${EXTRAS}" > requirements.txt \
    && if [ -n "${MEGATRON_CORE}" ]; then echo "${MEGATRON_CORE}"; \
        else python docker/requirements.py core; fi > core.txt \
    && python -m pip install --constraint pins.txt --requirement requirements.txt \
        --requirement core.txt \
    && python docker/requirements.py check pins.txt

COPY setup.py README.md LICENSE ./
COPY megatron megatron
COPY moe_ext moe_ext
COPY moe_app moe_app
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && python -m pip install --no-cache-dir --no-deps --no-index dist/*.whl

# Modes are set here: those of a checkout depend on who made it. The base's torchrun, if torch is the
# base's, would start ranks without this environment.
WORKDIR /opt/megatron-moe
COPY LICENSE README.md ./
COPY docker/entrypoint.sh docker/entrypoint.sh
COPY tools tools
COPY examples examples
RUN chmod -R u=rwX,go=rX . \
    && mkdir --mode 1777 runs data \
    && if [ ! -e /opt/venv/bin/torchrun ]; then \
        printf '#!/bin/sh\nexec /opt/venv/bin/python -m torch.distributed.run "$@"\n' \
            > /opt/venv/bin/torchrun \
        && chmod 755 /opt/venv/bin/torchrun; \
    fi

FROM ${BASE_IMAGE} AS runtime

# No number that a base's own users have. A home that any other user may write, too.
ARG USER_ID=10001
ARG GROUP_ID=10001
RUN groupadd --gid "${GROUP_ID}" trainer \
    && useradd --uid "${USER_ID}" --gid "${GROUP_ID}" --no-log-init --create-home trainer \
    && chmod 1777 /home/trainer

COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/megatron-moe /opt/megatron-moe

# Packages in a mounted home must not stand before the image's own.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/home/trainer \
    PYTHONNOUSERSITE=1
WORKDIR /opt/megatron-moe
USER ${USER_ID}:${GROUP_ID}

# An image in which these fail is not built.
RUN mkdir /tmp/check && export HOME=/tmp/check TMPDIR=/tmp/check \
    && python -c "import megatron.core, megatron.trainer.loop, moe_app.pretrain.command" \
    && python tools/doctor.py \
    && rm -r /tmp/check

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="megatron-moe" \
    org.opencontainers.image.description="Mixture-of-experts pretraining on megatron-core" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"

ENTRYPOINT ["/opt/megatron-moe/docker/entrypoint.sh"]
CMD ["help"]
