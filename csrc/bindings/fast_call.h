// Calls for small layers, where what pybind11 does per argument would cost more than the work: METH_FASTCALL, a plan and integers.
//
// A plan is what a layer's calls have in common, made once and kept in a capsule; the integers are sizes and addresses.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>

namespace pycompress {

template <class Plan>
pybind11::capsule make_plan(Plan* plan) {
  return pybind11::capsule(plan, Plan::kName, [](void* p) { delete static_cast<Plan*>(p); });
}

// A Python function (plan, integer, ...) around `run(const Plan&, const int64_t*)`; Plan::kIntegers says how many, kInput which one
// is the address of x, and Plan::work(integers) about how many multiply-accumulates: from 64 K on (a microsecond) other Python threads may
// run meanwhile.
template <class Plan, void (*run)(const Plan&, const int64_t*)>
PyObject* fast_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr int64_t kWorthReleasing = 64 * 1024;
  if (count != Plan::kIntegers + 1) {
    PyErr_Format(PyExc_TypeError, "%s: expected a plan and %d integers, got %zd arguments", Plan::kName, Plan::kIntegers, count);
    return nullptr;
  }
  const Plan* plan = static_cast<const Plan*>(PyCapsule_GetPointer(arguments[0], Plan::kName));
  if (!plan) return nullptr;
  int64_t integers[Plan::kIntegers];
  for (int i = 0; i < Plan::kIntegers; ++i) {
    integers[i] = PyLong_AsLongLong(arguments[i + 1]);
    if (integers[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const int64_t work = plan->work(integers);
  if (work > 0 && integers[Plan::kInput] == 0) {  // a ZeroTensor, a tensor subclass
    PyErr_Format(PyExc_ValueError, "%s: x has no memory of its own, got a tensor whose address is 0", Plan::kName);
    return nullptr;
  }
  try {
    if (work < kWorthReleasing) {
      run(*plan, integers);
    } else {
      pybind11::gil_scoped_release nogil;
      run(*plan, integers);
    }
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {  // none may leave through Python's C frames
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <class Plan, void (*run)(const Plan&, const int64_t*)>
void def_fast_call(pybind11::module_& m) {
  static PyMethodDef method = {Plan::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fast_call<Plan, run>)),
                               METH_FASTCALL, nullptr};
  m.add_object(Plan::kName, pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&method, nullptr, nullptr)));
}

}  // namespace pycompress
