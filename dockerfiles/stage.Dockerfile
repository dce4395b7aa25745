# qwen-stage: a range of layers. Two variants out of one file:
#   docker build -f dockerfiles/stage.Dockerfile -t localhost/qwen-stage:0.1.0-cpu .
#   docker build -f dockerfiles/stage.Dockerfile --build-arg DEVICE=cuda -t localhost/qwen-stage:0.1.0 .
# The CUDA one opens its GPU part while running, so it also serves on a CPU; the driver's libcuda comes from the node.
ARG BASE=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716

FROM ${BASE} AS build
ARG DEVICE=cpu
WORKDIR /src
COPY cmake/deps.sh cmake/deps.sh
COPY python_export/requirements.txt python_export/requirements.txt
COPY tests/cluster/kube tests/cluster/kube
RUN cmake/deps.sh apt rust dev && if [ "$DEVICE" = cuda ]; then cmake/deps.sh full; fi
COPY CMakeLists.txt ./
COPY cmake cmake
COPY stage stage
COPY controller controller
COPY tests tests
RUN eval "$(cmake/deps.sh env)" \
    && if [ "$DEVICE" = cuda ]; then cuda=ON; else cuda=OFF; fi \
    && cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DTORCH_SITE="$TORCH_SITE" -DWITH_CUDA="$cuda" \
    && cmake --build build --target qwen-stage \
    && if [ "$DEVICE" = cuda ]; then cmake --build build --target stage/kernels/all --target stage/fused/all --target stage/transport/all; fi
COPY dockerfiles/rootfs.sh dockerfiles/stage_rootfs.sh dockerfiles/
RUN eval "$(cmake/deps.sh env)" && dockerfiles/stage_rootfs.sh "$DEVICE" /rootfs build "$TORCH_SITE"

FROM scratch
COPY --from=build /rootfs /
# What the NVIDIA runtime mounts where a GPU is asked for; nothing on a CPU.
ENV PATH=/usr/local/bin NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
# data of the previous stage; /healthz, /ready, /metrics
EXPOSE 7001 9400
ENTRYPOINT ["/usr/local/bin/qwen-stage"]
