// The state behind the stand-in runtime: one device, its modules, the reports of its launches.
#pragma once
#include "machine.h"

namespace sim {

struct Runtime {
  Device device;
  std::vector<std::unique_ptr<Module>> modules;
  std::vector<std::string> reports, tables;   // of the launches since the last reset
  std::string error;                          // the last one, in words
  int status = 0;                             // its cudaError_t, until it is asked for

  int fail(int code, const std::string& what);
  Module* load(const std::string& ptx);   // null if it does not parse
  int launch(Module&, const std::string& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, size_t opted_in,
             void** args);
};

Runtime& runtime();

}  // namespace sim
