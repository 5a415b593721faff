# The module _C_cuda. Only with PYCOMPRESS_CUDA=ON (or the environment variable PYCOMPRESS_CUDA=1): without it no CUDA compiler is
# looked for. Links neither torch nor a shared CUDA runtime, so it loads, and says why it cannot run, on machines without a GPU.
if(CMAKE_VERSION VERSION_LESS 3.23)
  message(FATAL_ERROR "PYCOMPRESS_CUDA needs CMake 3.23 or newer, got ${CMAKE_VERSION}")
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12 REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*_cuda.cu)
set(hopper_sources ${cuda_sources})
list(FILTER cuda_sources EXCLUDE REGEX "_hopper_[^/]*$")
list(FILTER hopper_sources INCLUDE REGEX "_hopper_[^/]*$")
file(GLOB cuda_bindings CONFIGURE_DEPENDS csrc/bindings/*_cuda.cpp)
# "80" is machine code and PTX, which newer GPUs compile for themselves; "90a" unlocks what only Hopper has.
add_library(pycompress_cuda STATIC ${cuda_sources})
set_target_properties(pycompress_cuda PROPERTIES CUDA_ARCHITECTURES "80;90a-real")
# Kernels that consist of Hopper's own instructions, and exist only as its machine code.
add_library(pycompress_cuda_hopper STATIC ${hopper_sources})
set_target_properties(pycompress_cuda_hopper PROPERTIES CUDA_ARCHITECTURES "90a-real")
foreach(library pycompress_cuda pycompress_cuda_hopper)
  target_include_directories(${library} PUBLIC csrc)
  # As in the CPU kernels: an fma happens where the source says fma.
  target_compile_options(${library} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false>)
endforeach()

pybind11_add_module(_C_cuda MODULE ${cuda_bindings})
target_link_libraries(_C_cuda PRIVATE pycompress_cuda pycompress_cuda_hopper CUDA::cudart_static)
install(TARGETS _C_cuda LIBRARY DESTINATION pycompress)
