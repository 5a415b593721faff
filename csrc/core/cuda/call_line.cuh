// The line of a call, for what the emulator says about it: the last parameter of functions whose callers must meet.
#pragma once

#ifdef PYCOMPRESS_CUDA_EMULATION
#define PYCOMPRESS_ONLY_CALL_LINE int line = __builtin_LINE()
#define PYCOMPRESS_CALL_LINE , PYCOMPRESS_ONLY_CALL_LINE
#else
#define PYCOMPRESS_ONLY_CALL_LINE
#define PYCOMPRESS_CALL_LINE
#endif
