# LibTorch + CUDA 13.0 + NCCL out of PyPI wheels, or out of any tree laid out like site-packages (torch/, nvidia/cu13/,
# nvidia/nccl/). No find_package(Torch): the CUDA wheel's TorchConfig wants the whole toolkit and links torch_cuda everywhere.
#   -DTORCH_SITE=<site-packages>   set by the Makefile from cmake/deps.sh
#   -DCUDA_ROOT=<toolkit root>     default ${TORCH_SITE}/nvidia/cu13; on a machine with a CUDA toolkit: its root
set(TORCH_SITE "" CACHE PATH "directory holding torch/ and nvidia/")
set(EXTRA_SITE "" CACHE PATH "a second such directory to search at run time (a GPU machine's site-packages)")
if(NOT CUDA_ROOT)
  set(CUDA_ROOT "${TORCH_SITE}/nvidia/cu13" CACHE PATH "CUDA toolkit root" FORCE)
endif()
set(_tl "${TORCH_SITE}/torch/lib")

add_library(torchw::headers INTERFACE IMPORTED)
# torch/include also holds google/protobuf 3.13 and fmt 12, which would shadow Debian's: show only these directories.
set(_ti "${CMAKE_BINARY_DIR}/torch-include")
file(MAKE_DIRECTORY "${_ti}")
foreach(_d ATen c10 torch caffe2)
  file(CREATE_LINK "${TORCH_SITE}/torch/include/${_d}" "${_ti}/${_d}" SYMBOLIC)
endforeach()
target_include_directories(torchw::headers SYSTEM INTERFACE "${_ti}" "${_ti}/torch/csrc/api/include")

function(_torchw name)
  add_library(torchw::${name} SHARED IMPORTED)
  set_target_properties(torchw::${name} PROPERTIES IMPORTED_LOCATION "${_tl}/lib${name}.so" IMPORTED_NO_SONAME OFF)
endfunction()
_torchw(c10)
_torchw(torch_cpu)
_torchw(c10_cuda)
_torchw(torch_cuda)
target_link_libraries(torchw::c10 INTERFACE torchw::headers)
target_link_libraries(torchw::torch_cpu INTERFACE torchw::c10)

add_library(torchw::cudart SHARED IMPORTED)  # the wheels ship no libcudart.so symlink: name the soname file
find_file(CUDART_SO NAMES libcudart.so.13 PATHS "${CUDA_ROOT}/lib" "${CUDA_ROOT}/lib64" REQUIRED NO_DEFAULT_PATH)
set_target_properties(torchw::cudart PROPERTIES IMPORTED_LOCATION "${CUDART_SO}")
target_include_directories(torchw::cudart SYSTEM INTERFACE "${CUDA_ROOT}/include")

add_library(torchw::nccl SHARED IMPORTED)
find_file(NCCL_SO NAMES libnccl.so.2 PATHS "${TORCH_SITE}/nvidia/nccl/lib" REQUIRED NO_DEFAULT_PATH)
set_target_properties(torchw::nccl PROPERTIES IMPORTED_LOCATION "${NCCL_SO}")
target_include_directories(torchw::nccl SYSTEM INTERFACE "${TORCH_SITE}/nvidia/nccl/include")
target_link_libraries(torchw::nccl INTERFACE torchw::cudart)

target_link_libraries(torchw::c10_cuda INTERFACE torchw::c10 torchw::cudart)
target_link_libraries(torchw::torch_cuda INTERFACE torchw::torch_cpu torchw::c10_cuda)
# cublas, cudnn, cufft ... (1.9 GB of wheels) are needed only to run torch_cuda, not to link against it.
target_link_options(torchw::torch_cuda INTERFACE -Wl,--allow-shlib-undefined)
