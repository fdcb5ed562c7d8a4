// Run a package of AOTInductor without Python: run_package PACKAGE INPUTS OUTPUTS
//
// INPUTS is a list of tensors that torch.save wrote; torch.load reads OUTPUTS. How to build it: docs/export.md.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  file.exceptions(std::ios::failbit);
  return {std::istreambuf_iterator<char>(file), {}};
}

void run(const char* package, const char* inputs, const char* outputs) {
  torch::inductor::AOTIModelPackageLoader model(package);
  const auto loaded = torch::jit::pickle_load(read(inputs));
  std::vector<at::Tensor> tensors;
  for (const auto& value : loaded.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  const auto bytes = torch::jit::pickle_save(c10::IValue(model.run(tensors)));
  std::ofstream(outputs, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
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
