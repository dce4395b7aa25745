# qwen-controller: the operator. An empty image with one program and its libraries; no shell.
#   docker build -f dockerfiles/controller.Dockerfile -t localhost/qwen-controller:0.1.0 .
ARG BASE=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716

FROM ${BASE} AS build
WORKDIR /src
# The same first layers as head.Dockerfile: built once for both.
COPY cmake/deps.sh cmake/deps.sh
COPY python_export/requirements.txt python_export/requirements.txt
COPY tests/cluster/kube tests/cluster/kube
RUN cmake/deps.sh apt rust
COPY CMakeLists.txt ./
COPY cmake cmake
COPY stage stage
COPY controller controller
COPY tests tests
RUN cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DWITH_TORCH=OFF -DWITH_CUDA=OFF \
    && cmake --build build --target qwen-controller
COPY dockerfiles/rootfs.sh dockerfiles/rootfs.sh
RUN dockerfiles/rootfs.sh /rootfs build/bin/qwen-controller

FROM scratch
COPY --from=build /rootfs /
ENV PATH=/usr/local/bin
USER 65532:65532
# /healthz, /readyz, /metrics
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/qwen-controller"]
