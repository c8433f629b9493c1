"""One folder or file per backend; fastgpt.dispatch says who may run what."""
