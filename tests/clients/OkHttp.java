// OkHttp, which Android and many Java programs use: frames as they come, events, and a cancelled call.
import java.nio.charset.StandardCharsets;
import okhttp3.*;

public class OkHttp {
    static final OkHttpClient CLIENT = new OkHttpClient();
    static String server;

    static Call post(String path, String body) {
        RequestBody json = RequestBody.create(MediaType.parse("application/json"), body);
        return CLIENT.newCall(new Request.Builder().url(server + path).post(json).build());
    }

    public static void main(String[] arguments) throws Exception {
        server = arguments[0];
        String question = "{\"prompt\": \"什么是 HTTP？\", \"temperature\": 0}";
        try (Response response = post("/", question).execute()) {
            int reads = 0;
            var text = new okio.Buffer();
            while (response.body().source().read(text, 8192) != -1) reads++;
            String[] frames = text.readString(StandardCharsets.UTF_8).split("<\\^>");
            System.out.println("several reads: " + (reads > 1));
            System.out.println("answer: " + frames[frames.length - 1]);
        }
        try (Response response = post("/stream", question).execute()) {
            String line, last = "";
            while ((line = response.body().source().readUtf8Line()) != null) {
                if (line.startsWith("data: ")) last = line;
            }
            System.out.println("last event: " + last);
        }
        try (Response response = post("/", "{\"prompt\": \"hi\", \"temperature\": 3}").execute()) {
            System.out.println("refused: " + response.code() + " " + response.body().string());
        }
        Call endless = post("/", "{\"prompt\": \"从一数到一百\", \"repetition_penalty\": 0.5}");
        try (Response response = endless.execute()) {
            response.body().source().readByte();
            endless.cancel();
        }
        System.out.println("cancelled");
        CLIENT.dispatcher().executorService().shutdown();
        CLIENT.connectionPool().evictAll();
    }
}
