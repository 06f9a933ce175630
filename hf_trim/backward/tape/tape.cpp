// What the tape needs of autograd that Python cannot see, and what runs it, for `tapes.py` and `recorder.py`.
//
// - `walk`, `key`, `saved`, `leaves`: a graph (`graph.h`).
// - `program`, `run`, `attach`: a list of ops, and its runs (`program.h`).
//
// e.g. `program([("aten::mm", "", (("register", 0), ("register", 1)), ([2],), (0, 1), None)], ...)`: one product.

#include <torch/csrc/python_headers.h>

#include <ATen/ScalarOps.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Layout.h>
#include <torch/csrc/MemoryFormat.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "program.h"

namespace {

using namespace hf_trim;

constexpr const char* GRAPH = "hf_trim.Graph";
constexpr const char* PROGRAM = "hf_trim.Program";

template <typename T>
T* unpack(PyObject* capsule, const char* name) {
  auto* pointer = static_cast<T*>(PyCapsule_GetPointer(capsule, name));
  if (pointer == nullptr) {
    throw python_error();
  }
  return pointer;
}

template <typename T>
PyObject* pack(T* pointer, const char* name) {
  return PyCapsule_New(pointer, name, [](PyObject* capsule) {
    delete static_cast<T*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  });
}

int64_t integer(PyObject* x) {
  if (THPDtype_Check(x)) {
    return static_cast<int64_t>(reinterpret_cast<THPDtype*>(x)->scalar_type);
  }
  if (THPLayout_Check(x)) {
    return static_cast<int64_t>(reinterpret_cast<THPLayout*>(x)->layout);
  }
  if (THPMemoryFormat_Check(x)) {
    return static_cast<int64_t>(reinterpret_cast<THPMemoryFormat*>(x)->memory_format);
  }
  const auto value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) {
    throw python_error();
  }
  return value;
}

double real(PyObject* x) {
  const double value = PyFloat_AsDouble(x);
  if (value == -1.0 && PyErr_Occurred()) {
    throw python_error();
  }
  return value;
}

// A constant of Python as an argument of this type.
IValue constant(PyObject* x, const c10::TypePtr& type) {
  if (type->kind() == c10::TypeKind::OptionalType) {
    return x == Py_None ? IValue() : constant(x, type->castRaw<c10::OptionalType>()->getElementType());
  }
  switch (type->kind()) {
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
    case c10::TypeKind::ScalarTypeType:
    case c10::TypeKind::LayoutType:
    case c10::TypeKind::MemoryFormatType:
      return integer(x);
    case c10::TypeKind::FloatType:
      return real(x);
    case c10::TypeKind::BoolType:
      TORCH_CHECK(PyBool_Check(x), "expected a bool");
      return x == Py_True;
    case c10::TypeKind::TensorType:
      return at::native::wrapped_scalar_tensor(constant(x, c10::NumberType::get()).toScalar());
    case c10::TypeKind::NumberType:
      if (PyBool_Check(x)) {
        return x == Py_True;
      }
      if (PyComplex_Check(x)) {
        return c10::complex<double>(PyComplex_RealAsDouble(x), PyComplex_ImagAsDouble(x));
      }
      return PyFloat_Check(x) ? IValue(real(x)) : IValue(integer(x));
    case c10::TypeKind::DeviceObjType:
      TORCH_CHECK(THPDevice_Check(x), "expected a device");
      return reinterpret_cast<THPDevice*>(x)->device;
    case c10::TypeKind::StringType: {
      const char* text = PyUnicode_AsUTF8(x);
      if (text == nullptr) {
        throw python_error();
      }
      return std::string(text);
    }
    case c10::TypeKind::ListType: {
      const auto element = type->castRaw<c10::ListType>()->getElementType();
      const THPObjectPtr items(PySequence_Tuple(x));
      if (!items) {
        throw python_error();
      }
      const auto size = PyTuple_GET_SIZE(items.get());
      const auto fill = [&](auto list, auto convert) -> IValue {
        for (Py_ssize_t i = 0; i < size; ++i) {
          list.push_back(convert(PyTuple_GET_ITEM(items.get(), i)));
        }
        return list;
      };
      switch (element->kind()) {
        case c10::TypeKind::IntType:
        case c10::TypeKind::SymIntType:
          return fill(c10::List<int64_t>(), integer);
        case c10::TypeKind::FloatType:
          return fill(c10::List<double>(), real);
        case c10::TypeKind::BoolType:
          return fill(c10::List<bool>(), [](PyObject* item) { return item == Py_True; });
        default:
          break;
      }
      break;
    }
    default:
      break;
  }
  TORCH_CHECK(false, "no constant of the type ", type->str());
}

// Of numbers, and of tuples `(n,)` that stand for n for each kept row.
Integers counted_integers(PyObject* sequence) {
  const THPObjectPtr items(PySequence_Tuple(sequence));
  if (!items) {
    throw python_error();
  }
  Integers out;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.get()); ++i) {
    PyObject* item = PyTuple_GET_ITEM(items.get(), i);
    const bool is_per_row = PyTuple_Check(item);
    const auto number = integer(is_per_row ? PyTuple_GET_ITEM(item, 0) : item);
    out.fixed.push_back(is_per_row ? 0 : number);
    out.per_row.push_back(is_per_row ? number : 0);
  }
  return out;
}

std::vector<int> registers_of(PyObject* sequence) {
  const auto numbers = counted_integers(sequence).fixed;
  return std::vector<int>(numbers.begin(), numbers.end());
}

Op::Counted counted_of(size_t argument, PyObject* numbers, c10::TypePtr type) {
  if (type->kind() == c10::TypeKind::OptionalType) {
    type = type->castRaw<c10::OptionalType>()->getElementType();
  }
  const bool is_list = type->kind() == c10::TypeKind::ListType;
  const auto kind = (is_list ? type->castRaw<c10::ListType>()->getElementType() : type)->kind();
  TORCH_CHECK(kind == c10::TypeKind::IntType || kind == c10::TypeKind::SymIntType, "a value depends on the kept rows");
  return {argument, counted_integers(numbers), is_list};
}

void expect(Op& op, PyObject* expected) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(expected); ++i) {
    PyObject* item = PyList_GET_ITEM(expected, i);
    if (PyTuple_Check(item)) {
      op.numbers.emplace_back(counted_integers(expected).per_row);
      continue;
    }
    if (!PyList_Check(item)) {
      op.numbers.push_back(constant(item, op.handle.schema().returns()[i].type()));
      continue;
    }
    auto& sizes = op.sizes.emplace_back();
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(item); ++j) {
      sizes.push_back(counted_integers(PyList_GET_ITEM(item, j)));
    }
  }
}

// (name, overload, arguments, results, frees, expected). An argument is ("register", n), ("registers", [n, ...]), ("default",),
// ("constant", value), or ("counted", [integers]) for integers of which some depend on the number of kept rows.
Op op_of(PyObject* description) {
  const char *name = nullptr, *overload = nullptr;
  PyObject *arguments = nullptr, *results = nullptr, *frees = nullptr, *expected = nullptr;
  auto *tuple = &PyTuple_Type;
  if (!PyArg_ParseTuple(
          description, "ssO!O!OO", &name, &overload, tuple, &arguments, tuple, &results, &frees, &expected)) {
    throw python_error();
  }
  Op op{c10::Dispatcher::singleton().findSchemaOrThrow(name, overload)};
  op.frees = registers_of(frees);
  const auto& schema = op.handle.schema();
  TORCH_CHECK(schema.arguments().size() == static_cast<size_t>(PyTuple_GET_SIZE(arguments)), "another number of arguments");
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const char* kind = nullptr;
    PyObject* value = Py_None;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(arguments, i), "s|O", &kind, &value)) {
      throw python_error();
    }
    IValue argument;
    if (std::strcmp(kind, "register") == 0) {
      op.tensors.emplace_back(i, static_cast<int>(integer(value)));
    } else if (std::strcmp(kind, "registers") == 0) {
      const auto list = schema.arguments()[i].type()->expectRef<c10::ListType>();
      op.lists.push_back({i, registers_of(value), list.getElementType()->kind() == c10::TypeKind::OptionalType});
    } else if (std::strcmp(kind, "counted") == 0) {
      op.counted.push_back(counted_of(i, value, schema.arguments()[i].type()));
    } else if (std::strcmp(kind, "default") == 0) {
      TORCH_CHECK(schema.arguments()[i].default_value().has_value(), "an argument is missing");
      argument = *schema.arguments()[i].default_value();
    } else {
      argument = constant(value, schema.arguments()[i].type());
    }
    op.arguments.push_back(std::move(argument));
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(results); ++i) {
    op.results.push_back(registers_of(PyTuple_GET_ITEM(results, i)));
  }
  if (expected != Py_None) {
    expect(op, expected);
  }
  return op;
}

PyObject* py_walk(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *node = nullptr, *inputs = nullptr;
  if (!PyArg_ParseTuple(args, "OO!", &node, &PyList_Type, &inputs)) {
    return nullptr;
  }
  try {
    if (!torch::autograd::THPCppFunction_Check(node)) {
      throw Refusal(std::string(Py_TYPE(node)->tp_name) + " is not an ATen op");
    }
    const auto& root = reinterpret_cast<torch::autograd::THPCppFunction*>(node)->cdata;
    return pack(walk(root, THPVariable_UnpackList(inputs)).release(), GRAPH);
  } catch (const c10::Error& error) { // of `compiled_args`
    return PyUnicode_FromString(error.what_without_backtrace());
  } catch (const Refusal& reason) {
    return PyUnicode_FromString(reason.what());
  }
  END_HANDLE_TH_ERRORS
}

PyObject* py_key(PyObject* /*module*/, PyObject* graph) {
  HANDLE_TH_ERRORS
  const auto& key = unpack<Graph>(graph, GRAPH)->key;
  return PyBytes_FromStringAndSize(key.data(), static_cast<Py_ssize_t>(key.size()));
  END_HANDLE_TH_ERRORS
}

PyObject* py_saved(PyObject* /*module*/, PyObject* graph) {
  HANDLE_TH_ERRORS
  return THPVariable_WrapList(unpack<Graph>(graph, GRAPH)->saved);
  END_HANDLE_TH_ERRORS
}

PyObject* py_leaves(PyObject* /*module*/, PyObject* graph) {
  HANDLE_TH_ERRORS
  const auto& leaves = unpack<Graph>(graph, GRAPH)->leaves;
  THPObjectPtr out(PyList_New(static_cast<Py_ssize_t>(leaves.size())));
  for (size_t i = 0; out && i < leaves.size(); ++i) {
    PyList_SET_ITEM(out.get(), i, torch::autograd::functionToPyObject(leaves[i].node));
  }
  return out.release();
  END_HANDLE_TH_ERRORS
}

PyObject* py_producers(PyObject* /*module*/, PyObject* graph) {
  HANDLE_TH_ERRORS
  const auto& leaves = unpack<Graph>(graph, GRAPH)->leaves;
  THPObjectPtr out(PyList_New(static_cast<Py_ssize_t>(leaves.size())));
  for (size_t i = 0; out && i < leaves.size(); ++i) {
    PyList_SET_ITEM(out.get(), i, PyLong_FromUnsignedLongLong(leaves[i].producer->sequence_nr()));
  }
  return out.release();
  END_HANDLE_TH_ERRORS
}

// (ops, number of registers, of inputs, of ops that lead to numbers, [(saved tensor, register)], [(register, end) of each leaf])
PyObject* py_program(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *ops = nullptr, *saved = nullptr, *results = nullptr;
  Py_ssize_t num_registers = 0, num_inputs = 0, num_first = 0;
  auto* list = &PyList_Type;
  if (!PyArg_ParseTuple(
          args, "O!nnnO!O!", list, &ops, &num_registers, &num_inputs, &num_first, list, &saved, list, &results)) {
    return nullptr;
  }
  auto program = std::make_shared<Program>();
  program->num_registers = num_registers;
  program->num_inputs = num_inputs;
  program->num_first = num_first;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(ops); ++i) {
    program->ops.push_back(op_of(PyList_GET_ITEM(ops, i)));
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(saved); ++i) {
    const auto pair = registers_of(PyList_GET_ITEM(saved, i));
    program->saved.emplace_back(pair.at(0), pair.at(1));
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(results); ++i) {
    const auto values = registers_of(PyList_GET_ITEM(results, i));
    program->results.push_back({values.at(0), static_cast<size_t>(values.at(1))});
  }
  return pack(new std::shared_ptr<const Program>(std::move(program)), PROGRAM);
  END_HANDLE_TH_ERRORS
}

std::shared_ptr<Run> run_of(PyObject* args, Graph** graph) {
  PyObject *program = nullptr, *graph_object = nullptr, *inputs = nullptr;
  Py_ssize_t count = 0;
  if (!PyArg_ParseTuple(args, "OOO!n", &program, &graph_object, &PyList_Type, &inputs, &count)) {
    throw python_error();
  }
  *graph = unpack<Graph>(graph_object, GRAPH);
  auto& shared = *unpack<std::shared_ptr<const Program>>(program, PROGRAM);
  TORCH_CHECK(PyList_GET_SIZE(inputs) == static_cast<Py_ssize_t>(shared->num_inputs), "another number of inputs");
  TORCH_CHECK((*graph)->leaves.size() == shared->results.size(), "the program is of another graph");
  return std::make_shared<Run>(shared, **graph, THPVariable_UnpackList(inputs), count);
}

PyObject* py_run(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  Graph* graph = nullptr;
  const auto run = run_of(args, &graph);
  variable_list out;
  bool is_valid = false;
  {
    pybind11::gil_scoped_release no_gil;
    is_valid = run->begin();
    for (size_t i = 0; is_valid && i < graph->leaves.size(); ++i) {
      out.push_back(run->take(i));
    }
  }
  if (!is_valid) {
    Py_RETURN_NONE;
  }
  return THPVariable_WrapList(out);
  END_HANDLE_TH_ERRORS
}

PyObject* py_attach(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  Graph* graph = nullptr;
  const auto run = run_of(args, &graph);
  bool is_valid = false;
  {
    pybind11::gil_scoped_release no_gil;
    is_valid = run->begin();
  }
  if (is_valid) {
    attach(run, *graph);
  }
  return PyBool_FromLong(is_valid);
  END_HANDLE_TH_ERRORS
}

PyMethodDef METHODS[] = {
    {"walk", py_walk, METH_VARARGS, "(node, inputs) → the graph behind it, or why it has no tape."},
    {"key", py_key, METH_O, "All that the backward pass of a graph depends on but its numbers, as bytes."},
    {"saved", py_saved, METH_O, "The saved tensors of a graph."},
    {"leaves", py_leaves, METH_O, "The nodes of the leaves of a graph."},
    {"producers", py_producers, METH_O, "For each leaf of a graph the number of the node that hands out its gradient."},
    {"program", py_program, METH_VARARGS, "Makes a program."},
    {"run", py_run, METH_VARARGS, "(program, graph, inputs, k) → the gradients of the leaves, or None."},
    {"attach", py_attach, METH_VARARGS, "(program, graph, inputs, k) → whether the backward pass under way runs the program."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "hf_trim_tape", nullptr, -1, METHODS};

} // namespace

PyMODINIT_FUNC PyInit_hf_trim_tape() {
  return PyModule_Create(&MODULE);
}
