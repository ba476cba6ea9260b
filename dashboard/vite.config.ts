import { defineConfig } from "vite";

// Names without hashes, no source maps: the same sources give the same bytes, so that `./check` can
// compare the committed build with a fresh one.
export default defineConfig({
  base: "./",
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none" },
  build: {
    target: "es2022",
    outDir: "dist",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: false,
    rollupOptions: {
      output: {
        entryFileNames: "app.js",
        chunkFileNames: "[name].js",
        assetFileNames: "[name][extname]",
      },
    },
  },
  // `npm run dev` beside a running gateway.
  server: { proxy: { "/api": "http://127.0.0.1:15080" } },
});
