// What tests ask of the emulator, as functions of an emulated module.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

extern "C" void emulation_set_order(uint64_t order);
extern "C" void emulation_set_tensor_maps(int has);
extern "C" int emulation_launch_device(int i);

inline void bind_emulation_controls(pybind11::module_& m) {
  m.def("set_order", [](uint64_t order) { emulation_set_order(order); });
  m.def("set_tensor_maps", [](bool has) { emulation_set_tensor_maps(has); });  // whether the driver can make them
  m.def("current_device", [] { return emulation_launch_device(-2); });
  m.def("take_launches", [] {  // the devices of the launches since the last call
    pybind11::list devices;
    for (int i = 0, device; (device = emulation_launch_device(i)) >= 0; ++i) devices.append(device);
    return devices;
  });
}
