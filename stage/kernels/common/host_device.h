// stage/kernels/common/host_device.h — QP_HOST_DEVICE: in front of a function that a kernel and the host both call.
#pragma once

#ifdef __CUDACC__
#define QP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QP_HOST_DEVICE inline
#endif
