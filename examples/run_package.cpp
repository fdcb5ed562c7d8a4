// Run a package of AOTInductor without Python: run_package PACKAGE INPUTS OUTPUTS
//
// INPUTS is a list of tensors that torch.save wrote; OUTPUTS is a tuple that torch.load reads. docs/export.md says how to
// build it.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error(std::string("run_package: cannot read ") + path);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

void run(const char* package, const char* inputs, const char* outputs) {
  torch::inductor::AOTIModelPackageLoader model(package);
  const auto loaded = torch::jit::pickle_load(read(inputs));
  std::vector<at::Tensor> tensors;
  for (const auto& value : loaded.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  std::vector<c10::IValue> results;  // a tuple, which torch.load takes for plain data
  for (auto& result : model.run(tensors)) {
    results.emplace_back(std::move(result));
  }
  const auto bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(results)));
  std::ofstream file(outputs, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error(std::string("run_package: cannot write ") + outputs);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: run_package PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  try {
    run(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
