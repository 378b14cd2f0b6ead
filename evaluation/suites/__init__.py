"""Models of ILVR in the suites that others evaluate with: lmms-eval, VLMEvalKit. Neither is needed to import this."""
