// What every step calls, as functions of Python's own kind. Between two layers, or behind a forward, nothing
// is warm, and then ctypes and torch's way to an operation take several times as long as what they call.
// Without Python's headers this is empty, and those ways are taken.

#if __has_include(<Python.h>)

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "judge.h"
#include "route.h"

namespace {

void check_count(Py_ssize_t given, Py_ssize_t wanted, const char* name) {
  TORCH_CHECK_TYPE(given == wanted, name, " takes ", wanted, " arguments, not ", given);
}

// A whole number; null for None.
int64_t number(PyObject* object) {
  if (object == Py_None) return 0;
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

const WholeStep* step_at(PyObject* address) {
  const auto* step = reinterpret_cast<const WholeStep*>(number(address));
  TORCH_CHECK_VALUE(step != nullptr, "there is no step");
  return step;
}

// `moe_guard::route_on_cpu`.
PyObject* call_route(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  check_count(num_args, 6, "route");
  for (const int nth : {0, 1, 2, 3}) {
    TORCH_CHECK_TYPE(THPVariable_Check(args[nth]), "argument ", nth, " of route is no tensor");
  }
  at::Tensor topk_weights = THPVariable_Unpack(args[1]), topk_ids = THPVariable_Unpack(args[2]);
  std::optional<at::Tensor> bias;
  if (args[5] != Py_None) {
    TORCH_CHECK_TYPE(THPVariable_Check(args[5]), "the bias is no tensor");
    bias = THPVariable_Unpack(args[5]);
  }
  moe_guard::route(THPVariable_Unpack(args[0]), topk_weights, topk_ids, THPVariable_Unpack(args[3]),
                   number(args[4]), bias);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// `moe_guard_begin_step`.
PyObject* call_begin_step(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  check_count(num_args, 4, "begin_step");
  return PyBool_FromLong(
      moe_guard_begin_step(step_at(args[0]), number(args[1]), number(args[2]), number(args[3])));
  END_HANDLE_TH_ERRORS
}

// `moe_guard_end_step`.
PyObject* call_end_step(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  check_count(num_args, 5, "end_step");
  const auto* kv_slot_T = reinterpret_cast<const int64_t*>(number(args[3]));
  return PyLong_FromLongLong(moe_guard_end_step(step_at(args[0]), number(args[1]), number(args[2]), kv_slot_T,
                                                number(args[4]) != 0));
  END_HANDLE_TH_ERRORS
}

PyCFunction function(PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call));
}

PyMethodDef methods[] = {{"route", function(call_route), METH_FASTCALL, nullptr},
                         {"begin_step", function(call_begin_step), METH_FASTCALL, nullptr},
                         {"end_step", function(call_end_step), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module{PyModuleDef_HEAD_INIT, "moe_guard_cpu", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_moe_guard_cpu() { return PyModule_Create(&module); }

#endif
