import { defineConfig } from "vite";

export default defineConfig({
  base: "/static/",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../wbdist/server/ui/static",
    emptyOutDir: true,
    // The page's policy allows no data: scripts or styles, so nothing is inlined.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  // `npx vite` shows the pages of a server that runs on its default port.
  server: { proxy: { "/api": { target: "http://127.0.0.1:8420", changeOrigin: true } } },
});
