import js from "@eslint/js";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    languageOptions: { globals: globals.browser },
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      complexity: ["error", 12],
      eqeqeq: ["error", "always", { null: "ignore" }],
      "max-lines": ["error", 400],
      "max-lines-per-function": ["error", 60],
      "no-control-regex": "off", // what is invisible is what words.js looks for
      "no-shadow": "error",
      "no-undef": "off", // tsc knows
      "prefer-const": "error",
    },
  },
];
