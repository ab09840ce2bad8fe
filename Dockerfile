# The server's image: for NVIDIA's GPUs (--target cuda), or for processors alone (--target cpu, the default).
# make image builds it; docs/image.md tells how to run it.

# An index of several platforms; the tag is for readers. Another image does if it has Python 3.11, venv and ensurepip.
ARG BASE_IMAGE=docker.io/library/python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# What installs, and the empty environment that it installs into. The secret is a pip.conf, for mirrors and their
# passwords: no layer has it. With a SOURCE_DATE_EPOCH, of which any will do, compiled code is good for the text that it
# was compiled from, and not for that file's time, which a builder may change.
FROM ${BASE_IMAGE} AS tools
ENV PIP_BUILD_CONSTRAINT=/build/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    SOURCE_DATE_EPOCH=315532800
WORKDIR /build
COPY constraints.txt pyproject.toml ./
COPY scripts/pins.py scripts/sbom scripts/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/queryselect \
    && python3 -m venv /tools \
    && sed -n '/^pip==/,/[^\\]$/p' constraints.txt > pip.txt \
    && /tools/bin/pip install --require-hashes -r pip.txt \
    && /tools/bin/pip install --require-hashes -c constraints.txt cyclonedx-bom \
    && python3 -c 'from scripts import pins; print(*sorted(pins.wanted("references", "service", "tracing")))' > wanted

# What the server needs, and nothing of its own: these layers stay when its code changes. torch as the package index has
# it is built for CUDA, whose libraries are packages that it asks for.
FROM tools AS dependencies-cuda
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    sed -n 's/^torch==\([0-9.]*\).*/torch===\1/p' constraints.txt >> wanted \
    && xargs /tools/bin/pip --python /opt/queryselect install --require-hashes -c constraints.txt < wanted
COPY client/queryselect/_version.py client/queryselect/
RUN scripts/sbom /tools /opt/queryselect sbom.cdx.json

# torch without CUDA has an index of its own; empty: pip finds it as it is set up. Wherever it comes from, it has one of
# the hashes in constraints.txt.
FROM tools AS dependencies-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    sed -n 's/^torch==\([0-9.]*\).*/torch==\1+cpu/p' constraints.txt >> wanted \
    && xargs /tools/bin/pip --python /opt/queryselect install --require-hashes -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} < wanted
COPY client/queryselect/_version.py client/queryselect/
RUN scripts/sbom /tools /opt/queryselect sbom.cdx.json

# The server itself, as it lies in the image.
FROM tools AS package
COPY LICENSE README.md ./
COPY docs/licences.md docs/
COPY client/queryselect client/queryselect
COPY service/queryselect_service service/queryselect_service
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /tools/bin/pip --python /opt/queryselect install --no-deps --root /package . \
    && install -D -m 644 -t /package/usr/share/doc/queryselect LICENSE docs/licences.md

# What both images are: without pip and setuptools, which Python's own images have, and as a user that owns nothing.
FROM ${BASE_IMAGE} AS runtime
RUN rm -r "$(python3 -c 'import ensurepip; print(*ensurepip.__path__)')" \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages /usr/share/python-wheels
ENV PATH=/opt/queryselect/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GRPC_VERBOSITY=ERROR \
    QUERYSELECT_HOST=0.0.0.0 \
    QUERYSELECT_HEALTH_PORT=50052
USER 65532:65532
EXPOSE 50051 50052 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=2m CMD ["queryselect", "health", "localhost:50052"]
ENTRYPOINT ["queryselect"]
CMD ["serve"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="QuerySelect" \
    org.opencontainers.image.description="Which of these unlabelled items should people label next?" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# What NVIDIA's container toolkit is told to put in: the driver's libraries, which are the node's. Where there is another
# way than the toolkit, as on GKE, they are only mounted, in the folders that NVIDIA's own images look into.
FROM runtime AS cuda
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-cuda /opt/queryselect /opt/queryselect
COPY --from=dependencies-cuda /build/sbom.cdx.json /usr/share/doc/queryselect/
COPY --from=package /package /

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/queryselect /opt/queryselect
COPY --from=dependencies-cpu /build/sbom.cdx.json /usr/share/doc/queryselect/
COPY --from=package /package /
